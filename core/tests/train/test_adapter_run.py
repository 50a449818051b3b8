"""A run of adapters: saved alone, gone on with, merged into a folder, used to write text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import toy_run

from core.checkpoint.find import find_in
from core.checkpoint.settings import Checkpoint
from core.config.errors import UserError
from core.nn.decoder import Decoder
from core.quantization.lora import LoRAConverter
from core.runtime.ranks import Ranks
from core.testing.toy import Toy, on_cpu
from core.train.trainer import Trainer
from core.weights.convert import to_hf
from core.weights.folder import load_folder, save_weights

TOKENS = torch.arange(12).view(1, 12)


def adapter_run(folder: Path, *, steps: int = 4, dim: int = 16, **settings: Any) -> Trainer.Config:
    """A run that begins with the weights of a folder, drawn from another seed than its own."""
    config = toy_run(folder, steps=steps)
    config.model.dim = dim
    if not (folder / "base").exists():
        save_weights(on_cpu(config.model, seed=9), folder / "base")
    config.converters = [LoRAConverter.Config(rank=4, **settings)]
    config.checkpoint = Checkpoint(enable=True, interval=2, initial_load_path=str(folder / "base"))
    return config


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logits(model: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS)


@pytest.mark.parametrize(
    "settings", [{}, {"dora": True}, {"dora": True, "quantize_base": True, "dim": 64}], ids=["lora", "dora", "nf4"]
)
def test_adapters_alone_are_saved_gone_on_with_and_merged(
    tmp_path: Path, settings: dict[str, Any], capsys: Any
) -> None:
    config = adapter_run(tmp_path, **settings)
    if quantised := "quantize_base" in settings:
        to_hf({"toy": Toy}, tmp_path / "base", tmp_path / "published", dtype=None, shard_gib=1.0, trust=[])
        config.checkpoint.initial_load_path = str(tmp_path / "published")
    trainer: Trainer = config.build()
    base = {name: weight.clone() for name, weight in trainer.built.named_parameters() if name.endswith("weight")}
    _, folder = trainer.run()
    named = dict(trainer.built.named_parameters())
    assert all(torch.equal(named[name], weight) for name, weight in base.items())
    assert all(weight.any() for name, weight in named.items() if name.endswith("lora_b"))
    saved = find_in(str(folder), Ranks()).tensors()
    assert {name for name in saved if name.startswith("model.")} == {f"model.{n}" for n in named if n not in base}
    expected = losses(folder)
    config.checkpoint.load_step, config.checkpoint.allow_config_change = 2, False
    _, folder = config.build().run()
    assert losses(folder) == expected
    merged = on_cpu(config.model)
    load_folder(merged, folder)
    torch.testing.assert_close(logits(merged), logits(trainer.built.models[0]), rtol=0, atol=1e-5)
    assert quantised == any(weight.dtype == torch.uint8 for weight in base.values())
    assert not torch.allclose(logits(merged), logits(on_cpu(config.model, seed=9)), rtol=0, atol=1e-3)
    to_hf({"toy": Toy}, folder, tmp_path / "hf", dtype=None, shard_gib=1.0, trust=[])
    published = on_cpu(config.model)
    load_folder(published, tmp_path / "hf")
    assert torch.equal(logits(published), logits(merged))
    capsys.readouterr()
    to_hf({"toy": Toy}, folder, tmp_path / "peft", dtype=None, shard_gib=1.0, trust=[], peft=True)
    assert (f"which {tmp_path / 'base'} is not: write one with to-hf" in capsys.readouterr().out) != quantised
    load_folder(published, tmp_path / "peft")  # whose base is ours, or published
    if not quantised:
        torch.testing.assert_close(logits(published), logits(merged), rtol=0, atol=1e-5)


def test_adapters_of_a_run_go_to_peft_and_on(tmp_path: Path) -> None:
    """The base is the folder of another run's checkpoints, which peft's folder names."""
    first = toy_run(tmp_path / "first", steps=2)
    first.checkpoint = Checkpoint(enable=True, interval=2)
    _, base = first.build().run()
    config = adapter_run(tmp_path / "second")
    config.checkpoint.initial_load_path = str(base / "checkpoint")
    trainer: Trainer = config.build()
    _, folder = trainer.run()
    to_hf({"toy": Toy}, folder, tmp_path / "peft", dtype=None, shard_gib=1.0, trust=[], peft=True)
    third = adapter_run(tmp_path / "third")
    third.checkpoint.initial_load_path = str(tmp_path / "peft")
    on: Trainer = third.build()
    torch.testing.assert_close(logits(on.built.models[0]), logits(trainer.built.models[0]), rtol=0, atol=1e-5)


def test_mistakes_are_told(tmp_path: Path) -> None:
    config = adapter_run(tmp_path)
    config.checkpoint.initial_load_path = None
    with pytest.raises(UserError, match=r"checkpoint\.initial_load_path: adapters are for weights that are there"):
        config.build()
    config = adapter_run(tmp_path, steps=2)
    config.converters = [LoRAConverter.Config(rank=4, patterns=[pattern]) for pattern in ("*.wq", "*.wk")]
    with pytest.raises(
        UserError, match=r"converters\.1: a run has one rank and alpha: leave one converter of adapters"
    ):
        config.build()
    config = adapter_run(tmp_path, steps=2)
    _, folder = config.build().run()
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="holds adapters alone, and the weights that its run began with, .* are not"):
        load_folder(on_cpu(config.model), folder)
