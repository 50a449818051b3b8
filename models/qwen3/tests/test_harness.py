"""Results of lm_eval on our model and on what is exported; `nox -s evals` installs what that needs."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.evaluate.command import main as evaluate
from core.evaluate.observer import Evaluator
from core.quantization.lora import LoRAConverter
from core.runtime.records import read_records
from core.train.trainer import Trainer
from core.weights.convert import main as convert
from qwen3 import configs
from qwen3.model import Qwen3

pytestmark = pytest.mark.evals

TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["\\n\\n", "("], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
METRICS = {("choices", "acc"), ("choices", "acc_norm"), ("answers", "exact_match")}
METRICS |= {("texts", name) for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")}
QUESTIONS = ["def main(", "import ", "class Node:\n    def __init__(self", "The parser ", "for name in names:\n    "]


def short_run(home: Path, name: str = "run") -> Trainer.Config:
    """A run of some steps in a folder of `home`."""
    config = configs.qwen3_debug()
    (home / "text.txt").write_text("".join(f"def function_{n}(a, b):\n    return a + {n}\n\n" for n in range(3000)))
    config.dataloader.dataset, config.dump_folder = str(home / "text.txt"), str(home / name)
    config.training.steps, config.training.seq_len, config.training.local_batch_size = 12, 128, 2
    config.model.max_seq_len, config.validator.enable = 256, False
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of such a run, and that of its export."""
    home = tmp_path_factory.mktemp("trained")
    short_run(home).build().run()
    convert({"qwen3": Qwen3}, ["to-hf", str(home / "run"), str(home / "hf")])
    return home / "run", home / "hf"


def write_tasks(folder: Path, written: list[str]) -> None:
    docs = []
    for number, (question, text) in enumerate(zip(QUESTIONS, written, strict=True)):
        choices = {"choices": [" self", "s", " the", " x = 1\n"], "answer": number % 4}
        docs.append({"question": question, "text": f"{question} {number}\n" * 90, "written": text, **choices})
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, text in TASKS.items():
        source = (
            f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}}}\ntest_split: test\n"
        )
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}{text}")


def test_results_are_those_of_the_backend_for_hugging_face(trained, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    run, exported = trained
    theirs = HFLM(pretrained=str(exported), dtype="float32", device="cpu", batch_size=2, max_length=256)
    greedy: list[Any] = [
        type("Request", (), {"args": (q, {"until": ["\n\n", "("], "max_gen_toks": 24})}) for q in QUESTIONS
    ]
    written = theirs.generate_until(greedy)
    assert any(written)
    write_tasks(tmp_path, written)
    manager = TaskManager(include_path=str(tmp_path))
    found = lm_eval.simple_evaluate(
        theirs, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    words = ["--checkpoint", str(run), "--tasks", *TASKS, "--include-path", str(tmp_path), "--batch-tokens", "600"]
    evaluate(configs, [*words, "--out", str(tmp_path / "found.json")])
    ours = json.loads((tmp_path / "found.json").read_text())["tasks"]
    assert ours["answers"]["exact_match"] == 1.0
    for task, metrics in ours.items():
        for name, value in metrics.items():
            assert value == pytest.approx(found["results"][task][f"{name},none"], rel=1e-5), (task, name)
    assert {(task, name) for task, metrics in ours.items() for name in metrics} == METRICS


def test_adapters_are_asked_merged(trained, tmp_path, monkeypatch):
    """A run of adapters has the results of the folder that it is exported to."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    write_tasks(tmp_path, [" a, b"] * len(QUESTIONS))
    config = short_run(tmp_path, "adapters")
    config.converters = [LoRAConverter.Config(rank=4)]
    config.checkpoint.initial_load_path = str(trained[0])
    config.build().run()
    convert({"qwen3": Qwen3}, ["to-hf", str(tmp_path / "adapters"), str(tmp_path / "merged")])
    found = {}
    for name, folder in {"base": trained[0], "adapters": tmp_path / "adapters", "merged": tmp_path / "merged"}.items():
        words = ["--tasks", *TASKS, "--include-path", str(tmp_path), "--batch-tokens", "600"]
        evaluate(configs, ["--checkpoint", str(folder), *words, "--out", str(tmp_path / "found.json")])
        found[name] = json.loads((tmp_path / "found.json").read_text())["tasks"]
    assert {(task, name) for task, metrics in found["adapters"].items() for name in metrics} == METRICS
    for task, metrics in found["adapters"].items():
        assert metrics == pytest.approx(found["merged"][task], rel=1e-5)
    learned, before = (found[name]["texts"]["bits_per_byte"] for name in ("adapters", "base"))
    assert abs(learned - before) > 1e-3


def test_an_observer_runs_the_tasks_while_the_model_trains(trained, tmp_path, monkeypatch):
    """Its numbers are those of the command on what was saved at that step; the run learns as without it."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    write_tasks(tmp_path, [" a, b"] * len(QUESTIONS))
    config = short_run(tmp_path, "observed")
    config.observers = [Evaluator.Config(freq=6, tasks=list(TASKS), include_path=str(tmp_path), batch_tokens=600)]
    _, folder = config.build().run()
    records, plain = read_records(folder), read_records(trained[0])
    assert [record["loss"] for record in records] == [record["loss"] for record in plain]
    words = ["--tasks", *TASKS, "--include-path", str(tmp_path), "--batch-tokens", "600"]
    evaluate(configs, ["--checkpoint", str(folder), *words, "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["tasks"]
    seen = {name: value for name, value in records[-1].items() if name.startswith("eval/")}
    expected = {f"eval/{task}/{name}": value for task, metrics in found.items() for name, value in metrics.items()}
    assert seen == pytest.approx(expected, rel=1e-5) and len(seen) == len(METRICS)
    assert sum("eval/choices/acc" in record for record in records) == 2
