"""Runs whose layers were converted: said, saved, gone on with, refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from toy_run import toy_run

from core.checkpoint.settings import Checkpoint
from core.config import cli
from core.config.errors import UserError
from core.config.record import from_json, to_json
from core.quantization.aware import QATConverter
from core.quantization.converter import Converter
from core.quantization.float8 import Float8LinearConverter
from core.quantization.microscaling import FP4LinearConverter, MXFP8LinearConverter
from core.train.trainer import Trainer


def float8_run(folder: Path, *, steps: int = 4, **settings: Any) -> Trainer.Config:
    config = toy_run(folder, steps=steps)
    config.converters = [Float8LinearConverter.Config(emulate=True, **settings)]
    return config


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_says_what_it_converted_and_goes_on_to_the_same_bits(tmp_path: Path, capsys: Any) -> None:
    whole = float8_run(tmp_path)
    _, folder = whole.build().run()
    head = " ".join(capsys.readouterr().out.split())
    assert "layers float8: 8 of 15 layers, layers.*.attention.wq, " in head
    assert "layers.*.feed_forward.w1, layers.*.feed_forward.w3 (24 x 16 is no multiple of 16)" in head
    expected = losses(folder)
    stored = from_json((folder / "config.json").read_text())
    assert stored.converters == whole.converters
    parts = float8_run(tmp_path)
    parts.dump_folder, parts.checkpoint = str(tmp_path / "parts"), Checkpoint(enable=True, interval=2)
    parts.build().run()
    parts.checkpoint.load_step = 2
    _, folder = parts.build().run()
    assert losses(folder) == expected
    plain = toy_run(tmp_path)
    plain.dump_folder, plain.checkpoint = parts.dump_folder, parts.checkpoint
    with pytest.raises(UserError, match=r"is of another run:\n  converters\.0\.class "):
        plain.build()


BLOCKS: list[Converter.Config] = [
    MXFP8LinearConverter.Config(emulate=True),
    FP4LinearConverter.Config(emulate=True, random_hadamard=True),
    QATConverter.Config(),
]


@pytest.mark.parametrize("converter", BLOCKS, ids=["mxfp8", "nvfp4", "qat"])
def test_every_converter_goes_on_to_the_same_bits(tmp_path: Path, converter: Converter.Config) -> None:
    """Also with chance in its roundings, whose generator is saved; its settings come back from config.json."""
    run = toy_run(tmp_path)
    run.model.dim, run.model.attention.head_dim, run.model.feed_forward.hidden_dim = 32, 16, 64
    run.converters, run.checkpoint = [converter], Checkpoint(enable=True, interval=2)
    _, folder = run.build().run()
    expected, last = losses(folder), folder / "checkpoint/step-4/rank-00000.safetensors"
    weights = last.read_bytes()
    shutil.rmtree(folder / "checkpoint/step-4")
    again = from_json((folder / "config.json").read_text(), Trainer.Config)
    assert again.converters == [converter]
    trainer: Trainer = again.build()
    assert trainer.checkpoints.start.step == 2 and len(trainer.conversions[0].names) > 6
    trainer.run()
    assert losses(folder) == expected and last.read_bytes() == weights


def test_settings_are_data_and_options(tmp_path: Path) -> None:
    config = float8_run(tmp_path, patterns=["*.wo"])
    cli.override(config, cli.split_flags(["--converters.0.recipe_name", "rowwise"]))
    assert config.converters[0].recipe_name == "rowwise"
    assert from_json(to_json(config)) == config


def test_a_plan_counts_converted_layers(tmp_path: Path) -> None:
    config, other = float8_run(tmp_path, enable_fsdp_float8_all_gather=True), toy_run(tmp_path)
    config.training.device = other.training.device = "cpu"
    found, plain = (Trainer.plan(each, world_size=2, rank=0) for each in (config, other))
    assert found.notes[0].startswith("float8: 8 of 15 layers, ") and found.flops == plain.flops
    sent = [
        sum(part.bytes for part in each.traffic if (part.axis, part.collective) == ("shard", "all-gather"))
        for each in (found, plain)
    ]
    n_numbers = 2 * (32 * 16 + 16 * 16 + 16 * 16 + 16 * 32)  # of two blocks; half is sent, twice, in a byte and not 4
    assert sent[1] - sent[0] == n_numbers * 3


def test_a_device_without_kernels_is_told(tmp_path: Path) -> None:
    config = toy_run(tmp_path)
    config.training.device, config.converters = "cpu", [Float8LinearConverter.Config()]
    with pytest.raises(
        UserError, match=r"^converters\.0: float8 needs a GPU of compute capability 8\.9, and this is a"
    ):
        config.build()
