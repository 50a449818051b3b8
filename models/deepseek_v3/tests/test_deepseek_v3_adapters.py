"""Adapters of a model whose experts are chosen by scores with a bias, which moves while they learn."""

from pathlib import Path
from typing import Any

import pytest

from core.config.fields import walk
from core.nn.moe import Router
from core.quantization.lora import LoRAConverter
from core.testing.adapter_suite import adapter_run, logits_after
from core.weights import convert
from deepseek_v3 import configs
from deepseek_v3.model import DeepSeekV3


def test_a_bias_that_moved_is_not_for_peft(tmp_path: Path, capsys: Any) -> None:
    config = adapter_run(configs.deepseek_v3_debug(), tmp_path, LoRAConverter.Config(rank=4))
    logits_after(config)
    with pytest.raises(SystemExit):
        convert.main({"deepseek_v3": DeepSeekV3}, ["to-hf", str(tmp_path / "run"), str(tmp_path / "peft"), "--peft"])
    told = " ".join(capsys.readouterr().err.split())
    assert "layers.1.moe.router.selection_bias moved in training" in told and "leave --peft out" in told


def test_adapters_of_dense_networks_beside_experts_are_not_for_peft(tmp_path: Path, capsys: Any) -> None:
    config = adapter_run(configs.deepseek_v3_debug(), tmp_path, LoRAConverter.Config(rank=4))
    for _, node in walk(config.model):
        if isinstance(node, Router.Config):
            node.load_balance_coeff = 1e-60  # no move that fp32 has
    logits_after(config)
    with pytest.raises(SystemExit):
        convert.main({"deepseek_v3": DeepSeekV3}, ["to-hf", str(tmp_path / "run"), str(tmp_path / "peft"), "--peft"])
    told = " ".join(capsys.readouterr().err.split())
    assert "peft takes model.layers.0.mlp.gate_proj for theirs: leave --peft out" in told
