"""Adapters of experts, each of which peft keeps in those of a parameter that holds two of our weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core.config.recipe import load_config
from core.evaluate import command as evaluate
from core.generate import command as generate
from core.optim.groups import freeze
from core.quantization.converter import converted_model
from core.quantization.lora import LoRAConverter
from core.step.checks import check_model
from core.testing.adapter_suite import (
    TOKENS,
    adapter_run,
    check_commands_with_peft,
    logits_after,
    logits_in_peft,
    logits_of,
)
from core.testing.document import shown_files
from core.train.trainer import Trainer
from core.weights import convert
from qwen3 import configs
from qwen3.model import Qwen3MoE

FAMILY: Any = {"qwen3_moe": Qwen3MoE}


@pytest.mark.filterwarnings("ignore")  # warnings of other programs are theirs
@pytest.mark.parametrize("patterns", [["*"], ["*.w1", "*.wq"]], ids=["all", "one"])
def test_peft_has_the_adapters_of_experts_and_we_read_them(tmp_path: Path, patterns: list[str], capsys: Any) -> None:
    adapters = LoRAConverter.Config(rank=4, alpha=12.0, patterns=patterns)
    config = adapter_run(configs.qwen3_moe_debug(), tmp_path, adapters)
    expected = logits_after(config)
    convert.main(FAMILY, ["to-hf", str(tmp_path / "run"), str(tmp_path / "peft"), "--peft"])
    convert.main(FAMILY, ["from-hf", str(tmp_path / "peft"), str(tmp_path / "merged")])
    torch.testing.assert_close(logits_of(config, tmp_path / "merged"), expected, rtol=0, atol=1e-5)
    capsys.readouterr()
    written = []
    for folder in ("peft", "merged"):
        asked = ["--checkpoint", str(tmp_path / folder), "--prompt", "a page", "--max_new_tokens", "8"]
        generate.main(configs, [*asked, "--device", "cpu"])
        written.append(capsys.readouterr())
        told = f"adapters   of peft's, merged into the weights of {tmp_path / 'base'}" in written[-1].err
        assert told == (folder == "peft")
    assert written[0].out == written[1].out
    config.checkpoint.initial_load_path, config.dump_folder = str(tmp_path / "peft"), str(tmp_path / "on")
    trainer: Trainer = config.build()
    with torch.no_grad():
        found = trainer.built.models[0].eval()(TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_in_peft(tmp_path / "base", tmp_path / "peft"), expected, rtol=0, atol=1e-5)
    check_commands_with_peft(configs, tmp_path / "base", tmp_path / "peft", capsys)


def test_lengths_of_experts_beside_4_bits_are_merged_and_not_for_peft(tmp_path: Path, capsys: Any) -> None:
    adapters = LoRAConverter.Config(rank=4, patterns=["*.experts.*"], dora=True, quantize_base=True)
    config = adapter_run(configs.qwen3_moe_debug(), tmp_path, adapters)
    expected = logits_after(config)
    run, merged = str(tmp_path / "run"), str(tmp_path / "merged")
    torch.testing.assert_close(logits_of(config, Path(run)), expected, rtol=0, atol=1e-5)
    with pytest.raises(SystemExit):
        convert.main(FAMILY, ["to-hf", run, str(tmp_path / "peft"), "--peft"])
    assert "has lengths of rows (dora), which peft does not have of experts" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "peft").exists()
    convert.main(FAMILY, ["to-hf", run, merged])
    found = []
    for folder in (run, merged):
        asked = ["--checkpoint", folder, "--perplexity", str(tmp_path / "text.txt"), "--device", "cpu"]
        evaluate.main(configs, [*asked, "--out", str(tmp_path / "found.json")])
        (numbers,) = json.loads((tmp_path / "found.json").read_text())["perplexity"].values()
        found.append(pytest.approx(numbers["nats_per_token"], rel=1e-6) if found else numbers["nats_per_token"])
        capsys.readouterr()
        generate.main(
            configs, ["--checkpoint", folder, "--prompt", "a page", "--max_new_tokens", "8", "--device", "cpu"]
        )
        found.append(capsys.readouterr().out)
    assert found[:2] == found[2:] and found[1]


def test_the_document_has_recipes_that_train_what_they_say(tmp_path: Path) -> None:
    document = Path(__file__).parents[3] / "docs/adapters.md"
    (tmp_path / "tune.py").write_text(shown_files(document)["tune.py"])
    trained = {}
    for name in ("tuned", "tuned_in_4_bits", "last_blocks"):
        config = load_config([f"{tmp_path / 'tune.py'}:{name}"], configs)
        config.checkpoint.initial_load_path = str(tmp_path)
        model, _ = converted_model(config.model, config.converters)
        freeze(model.named_parameters(), config.optimizer.groups)
        check_model(model, config, torch.device("cpu"))
        trained[name] = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert all(weight.dtype == torch.uint8 for weight in frozen_layers(model)) == (name == "tuned_in_4_bits")
    assert len(trained["tuned"]) == 28 * 4 * 2 and len(trained["tuned_in_4_bits"]) == 28 * 7 * 2
    assert {name.split(".")[1] for name in trained["last_blocks"]} == {"24", "25", "26", "27"}


def frozen_layers(model: Any) -> list[torch.Tensor]:
    return [layer.w1.weight for layer in (block.feed_forward for block in model.layers.values())]
