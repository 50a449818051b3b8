"""Adapters of experts whose weights are transposed, and two of which alternate, at Hugging Face."""

from pathlib import Path
from typing import Any

import pytest
import torch

from core.quantization.lora import LoRAConverter
from core.testing.adapter_suite import adapter_run, check_commands_with_peft, logits_after, logits_in_peft, logits_of
from core.weights import convert
from gpt_oss import configs
from gpt_oss.model import GptOss

FAMILY: Any = {"gpt_oss": GptOss}


@pytest.mark.filterwarnings("ignore")  # warnings of other programs are theirs
def test_peft_has_the_adapters_of_experts_and_we_read_them(tmp_path: Path, capsys: Any) -> None:
    config = adapter_run(configs.gpt_oss_debug(), tmp_path, LoRAConverter.Config(rank=4, alpha=12.0))
    expected = logits_after(config)
    convert.main(FAMILY, ["to-hf", str(tmp_path / "run"), str(tmp_path / "peft"), "--peft"])
    convert.main(FAMILY, ["from-hf", str(tmp_path / "peft"), str(tmp_path / "merged")])
    torch.testing.assert_close(logits_of(config, tmp_path / "merged"), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_in_peft(tmp_path / "base", tmp_path / "peft"), expected, rtol=0, atol=1e-5)
    check_commands_with_peft(configs, tmp_path / "base", tmp_path / "peft", capsys)
