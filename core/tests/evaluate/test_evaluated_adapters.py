"""A run of adapters in low precision, measured: as the merged model, and the command and the report name both."""

import json
from pathlib import Path

import evaluated_recipes
import pytest

from core.checkpoint.settings import Checkpoint
from core.data.text import IndexedText
from core.data.tokenizer import Tokenizer
from core.evaluate.command import main
from core.evaluate.perplexity import perplexity_of
from core.evaluate.scores import score_rows
from core.quantization.float8 import Float8LinearConverter
from core.quantization.lora import LoRAConverter
from core.report.command import read_runs
from core.step.settings import Training
from core.testing.toy import on_cpu
from core.weights.folder import load_folder, save_weights

TEXT = "Nine green bottles, hanging on the wall.\n" * 8


def test_a_run_of_adapters_is_measured_merged_and_its_converters_are_named(tmp_path: Path, capsys):
    config = evaluated_recipes.toy()
    save_weights(on_cpu(config.model, seed=9), tmp_path / "base")
    (tmp_path / "text").mkdir()
    for n in range(20):
        (tmp_path / "text" / f"{n}.txt").write_text(f"{n} green bottles hanging on the wall\n" * 4)
    (tmp_path / "held out.txt").write_text(TEXT)
    config.dump_folder = str(tmp_path / "run")
    config.dataloader = IndexedText.Config(dataset=str(tmp_path / "text"), cache_folder=str(tmp_path / "cache"))
    config.training = Training(steps=3, seq_len=16, local_batch_size=2)
    config.lr_scheduler.warmup_steps, config.validator.enable = 0, False
    config.converters = [Float8LinearConverter.Config(emulate=True), LoRAConverter.Config(rank=4)]
    config.checkpoint = Checkpoint(enable=True, initial_load_path=str(tmp_path / "base"))
    config.build().run()
    file, out = tmp_path / "held out.txt", tmp_path / "found.json"
    capsys.readouterr()
    main(evaluated_recipes, ["--checkpoint", str(tmp_path / "run"), "--perplexity", str(file), "--out", str(out)])
    said = capsys.readouterr().err.splitlines()
    assert "adapters   of rank 4, merged into the weights that the run began with" in said
    assert "trained    by Float8LinearConverter, computed without here" in said
    merged = on_cpu(config.model)
    load_folder(merged, tmp_path / "run")
    tokenizer = Tokenizer.Config().build()
    sizes = {"seq_len": 64, "stride": 64}
    expected = perplexity_of(TEXT, tokenizer, lambda rows: score_rows(merged.eval(), rows, batch_tokens=512), **sizes)
    found = json.loads(out.read_text())["perplexity"][str(file)]
    assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    (shown,) = read_runs([str(tmp_path / "run")])
    assert shown.facts()["converters"] == "Float8LinearConverter, LoRAConverter"
