"""Results of lm_eval on a run of a model of transformers, and on its export; `nox -s evals` runs this."""

import json
from pathlib import Path

import pytest
from test_hf_runs import a_run

from core.evaluate.command import main as evaluate
from hf_models.commands import HFEvaluation
from hf_models.configs import TINY
from hf_models.convert import export

pytestmark = pytest.mark.evals

QUESTIONS = ["def main(", "import ", "class Node:\n    def __init__(self", "The parser ", "for name in names:\n    "]
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [" self", "s", " the", " x = 1"]
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
generation_kwargs: {until: ["("], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def test_results_are_those_of_lm_evals_own_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    config = a_run(TINY, tmp_path)
    config.build().run()
    run, exported, length = tmp_path / "run", tmp_path / "exported", config.model.max_seq_len
    export(run, exported)
    theirs = HFLM(pretrained=str(exported), dtype="float32", device="cpu", batch_size=2, max_length=length)
    asked = {"until": ["("], "max_gen_toks": 24}
    written = theirs.generate_until([type("Request", (), {"args": (each, asked)}) for each in QUESTIONS])  # pyrefly: ignore
    assert any(written)
    docs = [
        {"question": question, "text": f"{question} {n}\n" * 90, "written": text, "answer": n % 4}
        for n, (question, text) in enumerate(zip(QUESTIONS, written, strict=True))
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/docs.jsonl}}}}\ntest_split: test\n"
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{source}{text}")
    manager = TaskManager(include_path=str(tmp_path))
    expected = lm_eval.simple_evaluate(
        theirs, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=False
    )["results"]
    for folder in (run, exported):
        words = ["--checkpoint", str(folder), "--tasks", *TASKS, "--include-path", str(tmp_path), "--device", "cpu"]
        out = tmp_path / "found.json"
        evaluate("hf_models.configs", [*words, "--batch-tokens", "600", "--out", str(out)], HFEvaluation)
        found = {
            (task, name): n for task, own in json.loads(out.read_text())["tasks"].items() for name, n in own.items()
        }
        assert found == {key: pytest.approx(expected[key[0]][f"{key[1]},none"], rel=1e-5) for key in found}
        assert found["answers", "exact_match"] == 1.0 and len(found) == 6
