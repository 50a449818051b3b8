"""A run of adapters in low precision, measured: as the merged model, and the command and the report name both."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluated_recipes
import pytest
import torch

from core.checkpoint.settings import Checkpoint
from core.data.text import IndexedText
from core.data.tokenizer import Tokenizer
from core.evaluate import command
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of adapters beside products of 8 bits."""
    home, config = tmp_path_factory.mktemp("adapters"), evaluated_recipes.toy()
    save_weights(on_cpu(config.model, seed=9), home / "base")
    (home / "text").mkdir()
    for n in range(20):
        (home / "text" / f"{n}.txt").write_text(f"{n} green bottles hanging on the wall\n" * 4)
    config.dump_folder = str(home / "run")
    config.dataloader = IndexedText.Config(dataset=str(home / "text"), cache_folder=str(home / "cache"))
    config.training = Training(steps=3, seq_len=16, local_batch_size=2)
    config.lr_scheduler.warmup_steps, config.validator.enable = 0, False
    config.converters = [Float8LinearConverter.Config(emulate=True), LoRAConverter.Config(rank=4)]
    config.checkpoint = Checkpoint(enable=True, initial_load_path=str(home / "base"))
    config.build().run()
    return home / "run"


def test_a_run_of_adapters_is_measured_merged_and_its_converters_are_named(trained: Path, tmp_path: Path, capsys):
    file, out = tmp_path / "held out.txt", tmp_path / "found.json"
    file.write_text(TEXT)
    capsys.readouterr()
    main(evaluated_recipes, ["--checkpoint", str(trained), "--perplexity", str(file), "--out", str(out)])
    said = capsys.readouterr().err.splitlines()
    assert "adapters   of rank 4, merged into the weights that the run began with" in said
    assert "trained    by Float8LinearConverter, computed without here" in said
    merged = on_cpu(evaluated_recipes.toy().model)
    load_folder(merged, trained)
    tokenizer = Tokenizer.Config().build()
    sizes = {"seq_len": 64, "stride": 64}
    expected = perplexity_of(TEXT, tokenizer, lambda rows: score_rows(merged.eval(), rows, batch_tokens=512), **sizes)
    found = json.loads(out.read_text())["perplexity"][str(file)]
    assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    (shown,) = read_runs([str(trained)])
    assert shown.facts()["converters"] == "Float8LinearConverter, LoRAConverter"


def test_tasks_ask_the_merged_model(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of lm_eval stands what asks the model once; `nox -s evals` asks through lm_eval itself."""
    tokens_BL = torch.arange(12).view(1, 12)

    def answers(asked: Any, tasks: list[str], **options: Any) -> dict[str, dict[str, float]]:
        with torch.no_grad():
            return {task: {"largest": asked.model(tokens_BL).max().item()} for task in tasks}

    harness = SimpleNamespace(
        HarnessModel=lambda model, tokenizer, **settings: SimpleNamespace(model=model), run_tasks=answers
    )
    monkeypatch.setitem(sys.modules, "core.evaluate.harness", harness)
    monkeypatch.setattr(command, "find_spec", lambda name: name)
    out = tmp_path / "found.json"
    main(evaluated_recipes, ["--checkpoint", str(trained), "--tasks", "arc_easy", "--out", str(out)])
    merged, base = on_cpu(evaluated_recipes.toy().model), on_cpu(evaluated_recipes.toy().model)
    load_folder(merged, trained)
    load_folder(base, trained.parent / "base")
    with torch.no_grad():
        expected, before = (model.eval()(tokens_BL).max().item() for model in (merged, base))
    assert json.loads(out.read_text())["tasks"] == {"arc_easy": {"largest": pytest.approx(expected, rel=1e-6)}}
    assert abs(expected - before) > 1e-4, "the adapters learned too little to be seen"
