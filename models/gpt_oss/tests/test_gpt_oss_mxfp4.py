"""Experts trained as the 4 bits that they are published in: our folder, transformers, and the run say the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from core.quantization.aware import QATConverter
from core.quantization.forms import FORMS
from core.testing.toy import on_cpu
from core.weights import convert
from core.weights.folder import load_folder, save_weights
from core.weights.mxfp4 import to_mxfp4
from core.weights.quantised import mxfp4
from gpt_oss.model import GptOss, size

TOKENS = torch.arange(3, 27).view(2, 12)


def test_what_is_written_has_the_numbers_of_the_form() -> None:
    x = torch.randn(3, 5, 64) * torch.logspace(-30, 4, 64)
    x[0, 0], x[1, 2, :32] = 0.0, torch.arange(32) / 4 - 3.875  # every tie between two numbers
    blocks, scales = to_mxfp4(x.mT)
    assert blocks.shape == (3, 5, 2, 16) and scales.shape == (3, 5, 2)
    assert torch.equal(mxfp4(blocks, scales).mT, FORMS["mxfp4"].quantised(x, None))


@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers says which kernels a CPU lacks
def test_an_export_in_4_bits_is_what_was_trained(tmp_path: Path) -> None:
    config = replace(size("debug"), n_layers=2)
    model = on_cpu(config, seed=5)
    for block in model.layers.values():
        for layer in (block.moe.experts.w1, block.moe.experts.w2, block.moe.experts.w3):
            layer.weight.data.mul_(8.0)
    save_weights(model, tmp_path / "ours")
    convert.main({"gpt_oss": GptOss}, ["to-hf", str(tmp_path / "ours"), str(tmp_path / "hf"), "--mxfp4"])
    stated = json.loads((tmp_path / "hf/config.json").read_text())
    assert stated["quantization_config"]["quant_method"] == "mxfp4" and stated["dtype"] == "float32"
    with torch.no_grad():
        plain = model.eval()(TOKENS)
        QATConverter.Config(patterns=["*.experts.*"]).build().apply(model)
        expected = model(TOKENS)
        assert (expected - plain).abs().max() > 1e-2
        read = on_cpu(config)
        load_folder(read, tmp_path / "hf")
        torch.testing.assert_close(read.eval()(TOKENS), expected, rtol=0, atol=1e-5)
        decoded = transformers.Mxfp4Config(dequantize=True)  # the 4 bits themselves need a GPU's kernels there
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "hf", dtype=torch.float32, quantization_config=decoded
        ).eval()
        torch.testing.assert_close(theirs(TOKENS).logits, expected, rtol=0, atol=1e-5)


def test_sizes_that_are_no_whole_blocks_are_refused(tmp_path: Path, capsys: Any) -> None:
    config = replace(size("debug"), n_layers=1)
    config.moe.experts.hidden_dim = 40
    save_weights(on_cpu(config), tmp_path / "ours")
    with pytest.raises(SystemExit):
        convert.main({"gpt_oss": GptOss}, ["to-hf", str(tmp_path / "ours"), str(tmp_path / "hf"), "--mxfp4"])
    assert "has 40 inputs, no multiple of the 32 of a block" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
