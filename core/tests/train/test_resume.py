"""Runs that stop and go on: in other layouts, with other settings, from other places."""

import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_run import toy_run, train_until

from core.checkpoint.find import find_in, inspect
from core.checkpoint.index import read_tensor
from core.checkpoint.settings import Checkpoint
from core.checkpoint.storage import Storage, steps_in
from core.config.errors import UserError
from core.config.record import from_json, to_json
from core.data.text import StreamedText
from core.parallel.settings import Parallelism
from core.runtime.ranks import Ranks
from core.step.settings import Training
from core.testing.ranks import run_ranks
from core.testing.resume_suite import measured
from core.testing.toy import Toy, ToyMoE, on_cpu
from core.train.state import stored_tensors
from core.train.trainer import Trainer
from core.weights.folder import save_weights


def a_run(folder: Path, *, moe: bool = False, steps: int = 4, place: str = "checkpoint", **checkpoint: object):
    """A run in `folder`/run of two microbatches a step, saved every second step."""
    run = toy_run(folder, steps=steps)
    if moe:
        run.model = ToyMoE.Config(vocab_size=2048)
    run.training = Training(steps=steps, seq_len=16, local_batch_size=4, global_batch_size=8)
    run.checkpoint = Checkpoint(**{"enable": True, "interval": 2, "folder": place, **checkpoint})
    return run


def go(run: str, leaves_at: int = 0) -> int:
    """Train the run of this JSON, asked to stop in step `leaves_at`; returns the step that it began after."""
    trainer = from_json(run).build()
    train_until(trainer, leaves_at)
    return trainer.checkpoints.start.step


def begun(run: Trainer.Config) -> Trainer:
    """A run that is ready to train, and out of its folder again."""
    trainer = run.build()
    trainer.exit.close()
    return trainer


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, but those of the random generators."""
    storage, name = Storage(folder / "run/checkpoint"), f"step-{step}"
    index = inspect(storage, name, Ranks()).tensors()
    return {key: read_tensor(storage, name, stored) for key, stored in index.items() if not key.startswith("random")}


LAYOUTS = [
    (4, {}),
    (4, {"tensor_parallel_degree": 2}),
    (1, {}),
    (2, {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 2}),
    (4, {"expert_parallel_degree": 2}),
    (2, {"context_parallel_degree": 2}),
    (2, {"data_parallel_replicate_degree": 2}),
]


def test_a_run_goes_on_in_any_layout(tmp_path):
    """One run that moves from layout to layout every two steps, beside one that never stopped."""
    steps = 2 * len(LAYOUTS)
    alone, moving = tmp_path / "alone", tmp_path / "moving"
    go(to_json(a_run(alone, moe=True, steps=steps)))
    for number, (n_ranks, degrees) in enumerate(LAYOUTS):
        run = a_run(moving, moe=True, steps=steps)
        run.parallelism = Parallelism(**degrees)
        run.training.local_batch_size = 2 if n_ranks == 4 else 4
        assert set(run_ranks(go, n_ranks, to_json(run), 2 * number + 2)) == {2 * number}
    expected, found = (measured(folder / "run") for folder in (alone, moving))
    assert [record["step"] for record in found] == list(range(1, steps + 1))
    for here, there in zip(found, expected, strict=True):
        assert here["tokens"] == there["tokens"] and here["lr"] == there["lr"]
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4)
    states = [weights(folder, steps) for folder in (alone, moving)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("degrees", "mode"),
    [
        pytest.param({}, "async", id="FSDP 2-async"),
        pytest.param({"tensor_parallel_degree": 2}, "disabled", id="TP 2-disabled"),
        pytest.param({}, "disabled", id="FSDP 2-disabled", marks=pytest.mark.matrix),
        pytest.param({"tensor_parallel_degree": 2}, "async", id="TP 2-async", marks=pytest.mark.matrix),
    ],
)
def test_the_same_ranks_go_on_bit_for_bit(tmp_path, degrees, mode):
    for folder, leaves in ((tmp_path / "whole", [0]), (tmp_path / "again", [2, 0])):
        for leaves_at in leaves:
            run = a_run(folder, moe=True, async_mode=mode)
            run.parallelism = Parallelism(**degrees)
            run_ranks(go, 2, to_json(run), leaves_at)
    states = [weights(tmp_path / name, 4) for name in ("whole", "again")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert measured(tmp_path / "whole/run") == measured(tmp_path / "again/run")
    for rank in (0, 1):
        files = [tmp_path / name / f"run/checkpoint/step-4/rank-{rank:05}.safetensors" for name in ("whole", "again")]
        assert files[0].read_bytes() == files[1].read_bytes()


def streamed(folder: Path) -> StreamedText.Config:
    return StreamedText.Config(dataset=str(folder / "whole/text"), validation_fraction=0.1)


def test_a_stream_goes_on_where_it_stood(tmp_path):
    for folder, leaves in ((tmp_path / "whole", [0]), (tmp_path / "again", [3, 0])):
        for leaves_at in leaves:
            run = a_run(folder)
            run.dataloader = streamed(tmp_path)
            go(to_json(run), leaves_at)
    assert measured(tmp_path / "whole/run") == measured(tmp_path / "again/run")
    run = a_run(tmp_path / "again", steps=6, allow_config_change=True)
    run.dataloader = streamed(tmp_path)
    run.training.local_batch_size = 2
    with pytest.raises(AssertionError, match="saved by 1 data ranks that read a stream, and here are 2: take as many"):
        run_ranks(go, 2, to_json(run))


def trained(folder: Path, **settings: object) -> Path:
    """A run of four steps, with checkpoints of the second and the last."""
    go(to_json(a_run(folder, **settings)))
    return folder / "run"


def refusal(run: Trainer.Config) -> str:
    with pytest.raises(UserError) as error:
        run.build()
    return str(error.value)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda run: setattr(run.optimizer, "lr", 0.5), "optimizer.lr 0.01 -> 0.5"),
        (
            lambda run: setattr(run.training, "global_batch_size", 4),
            "rows per step 8 -> 4: --training.global_batch_size 8",
        ),
        (lambda run: setattr(run.training, "steps", 3), "training.steps 4 -> 3"),
        (lambda run: setattr(run.debug, "seed", 3), "debug.seed 0 -> 3"),
    ],
)
def test_another_run_is_refused_unless_one_insists(tmp_path, change, said):
    trained(tmp_path)
    run = a_run(tmp_path)
    change(run)
    text = refusal(run)
    assert text.splitlines()[0].endswith("step-4 is of another run:") and said in text
    assert "--checkpoint.allow_config_change" in text.splitlines()[-1]
    run.checkpoint.allow_config_change = True
    assert begun(run).checkpoints.start.step == 4


def test_a_schedule_of_its_own_length_lets_a_run_become_longer_at_any_step(tmp_path):
    run, longer = a_run(tmp_path), a_run(tmp_path, steps=8, load_step=2)
    run.lr_scheduler.total_steps = 8
    go(to_json(run))
    assert "lr_scheduler.total_steps 8 -> None" in refusal(longer)
    longer.lr_scheduler.total_steps = 8
    assert begun(longer).checkpoints.start.step == 2


def test_what_does_not_change_a_run_may_change(tmp_path):
    trained(tmp_path)
    run = a_run(tmp_path)
    run.training.local_batch_size, run.metrics.log_freq, run.checkpoint.interval = 8, 3, 7
    run.activation_checkpoint.mode = "none"
    assert begun(run).checkpoints.start.step == 4


def test_a_changed_text_is_another_run(tmp_path):
    trained(tmp_path)
    (tmp_path / "text/000.txt").write_text("something else\n")
    assert "the text or the tokenizer has changed since" in refusal(a_run(tmp_path))


def test_a_text_that_moved_is_the_same(tmp_path):
    trained(tmp_path)
    shutil.move(tmp_path / "text", tmp_path / "moved")
    run = a_run(tmp_path, allow_config_change=True)
    run.dataloader.dataset = str(tmp_path / "moved")
    trainer = begun(run)
    assert trainer.checkpoints.start.text == trainer.checkpoints.found.manifest.progress.text


def test_an_earlier_step_is_asked_for(tmp_path):
    folder = trained(tmp_path)
    whole = weights(tmp_path, 4)
    assert refusal(a_run(tmp_path, load_step=3)).startswith("checkpoint.load_step 3: ")
    assert refusal(a_run(tmp_path, load_step=3)).endswith("holds step-4, step-2")
    go(to_json(a_run(tmp_path, load_step=2)))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(tmp_path, 4).items())
    names = sorted(path.name for path in (folder / "checkpoint").glob("*-*"))
    assert names == ["replaced-step-4-1", "step-2", "step-4"]


def test_resume_never_and_must(tmp_path):
    assert "holds no checkpoint: use auto to begin anew" in refusal(a_run(tmp_path, resume="must"))
    folder = trained(tmp_path / "x", resume="never")
    assert "already holds a run" in refusal(a_run(tmp_path / "x", resume="never"))
    (folder / "metrics.jsonl").unlink()
    assert "checkpoint.resume never, and " in refusal(a_run(tmp_path / "x", resume="never"))
    assert begun(a_run(tmp_path / "x", resume="must")).checkpoints.start.step == 4


def test_what_is_excluded_stays_as_a_new_run_has_it(tmp_path, capfd):
    trained(tmp_path)
    whole = weights(tmp_path, 4)
    for left, start in (("train_state", (0, 0, 32)), ("dataloader", (4, 512, 0)), ("optimizer", (4, 512, 32))):
        trainer = begun(a_run(tmp_path, steps=6, exclude_from_loading=[left], load_only=True))
        begin = trainer.checkpoints.start
        assert (begin.step, begin.tokens, begin.rows) == start
        moment = trainer.optimizer.state["norm.weight"]["exp_avg"]
        assert torch.equal(moment, whole["optimizer.norm.weight.exp_avg"]) == (left != "optimizer")
    trainer = begun(a_run(tmp_path, steps=6, exclude_from_loading=["model"], load_only=True))
    assert not torch.equal(trainer.built.models[0].norm.weight, whole["model.norm.weight"])
    said = capfd.readouterr()
    for left in ("train_state", "dataloader", "optimizer", "model"):
        assert f"checkpoint.exclude_from_loading: {left} of " in said.out + said.err


def test_tensors_that_a_checkpoint_lacks_are_told(tmp_path, capfd):
    found = find_in(str(trained(tmp_path)), Ranks())
    there = {name: torch.empty(1) for name in found.tensors() if name.startswith("model.")}
    new = {f"outer.{name}": torch.empty(1) for name in "ab"}
    assert stored_tensors(there | {"model.new": torch.empty(1)} | new, found) == there
    said = "".join(capfd.readouterr())
    assert f"lacks 1 of the {len(there) + 1} tensors model, which begin anew: model.new" in said
    assert "has no tensors outer: they begin anew" in said and "no tensors model" not in said


def test_load_only_saves_nothing(tmp_path):
    folder = trained(tmp_path)
    before = sorted((folder / "checkpoint").rglob("*"))
    go(to_json(a_run(tmp_path, load_only=True, load_step=2)))
    assert sorted((folder / "checkpoint").rglob("*")) == before


@pytest.mark.parametrize(
    "path", [lambda run: run, lambda run: run / "checkpoint", lambda run: run / "checkpoint/step-4"]
)
def test_a_run_begins_with_the_weights_of_another(tmp_path, path: Callable[[Path], Path]):
    first = trained(tmp_path / "first")
    second = a_run(tmp_path / "second", initial_load_path=str(path(first)))
    trainer = begun(second)
    assert trainer.checkpoints.start.step == 0
    whole = weights(tmp_path / "first", 4)
    for name, weight in trainer.built.named_parameters():
        assert torch.equal(weight, whole[f"model.{name}"])
    assert not trainer.optimizer.state["norm.weight"]["exp_avg"].any()


def test_a_run_with_multi_token_prediction_begins_with_weights_that_have_none(tmp_path, capfd):
    first = trained(tmp_path / "first")
    second = a_run(tmp_path / "second", initial_load_path=str(first))
    second.model.n_mtp_layers = 1
    drawn = begun(replace(second, checkpoint=Checkpoint(), dump_folder=str(tmp_path / "drawn")))
    capfd.readouterr()
    trainer = begun(second)
    said = "".join(capfd.readouterr())
    assert said.count("has no weights of multi-token prediction: they are not loaded") == 1 and "mtp" not in said
    whole, fresh = weights(tmp_path / "first", 4), dict(drawn.built.named_parameters())
    found = dict(trainer.built.named_parameters())
    mtp = {name for name in found if f"model.{name}" not in whole}
    assert {"ahead.2.norm.weight", "layers.2.attention.wq.weight"} < mtp
    for name, weight in found.items():
        assert torch.equal(weight, fresh[name] if name in mtp else whole[f"model.{name}"]), name


def test_a_run_goes_on_from_the_folder_of_another(tmp_path):
    first = trained(tmp_path / "first")
    options = {"initial_load_path": str(first / "checkpoint/step-2"), "initial_load_model_only": False}
    run = a_run(tmp_path / "second", **options)
    run.dataloader.dataset = str(tmp_path / "first/text")
    go(to_json(run))
    expected, found = weights(tmp_path / "first", 4), weights(tmp_path / "second", 4)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert [record["step"] for record in measured(tmp_path / "second/run")] == [3, 4]


def test_checkpoints_elsewhere(tmp_path):
    place = f"memory://{uuid.uuid4().hex}/run"
    run = to_json(a_run(tmp_path, place=place))
    assert go(run, leaves_at=2) == 0 and steps_in(Storage(place)) == [2]
    assert go(run) == 2 and steps_in(Storage(place)) == [2, 4]
    trained(tmp_path / "here")
    expected = weights(tmp_path / "here", 4)
    index = inspect(Storage(place), "step-4", Ranks()).tensors()
    assert all(torch.equal(read_tensor(Storage(place), "step-4", index[name]), expected[name]) for name in expected)


def test_of_weights_alone_no_run_goes_on(tmp_path):
    folder = trained(tmp_path, last_save_model_only=True, export_dtype="bfloat16")
    stored = weights(tmp_path, 4)
    assert {name.partition(".")[0] for name in stored} == {"model"}
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    text = refusal(a_run(tmp_path, steps=6))
    assert "holds weights alone" in text and f"--checkpoint.initial_load_path {folder}/checkpoint/step-4" in text
    assert begun(a_run(tmp_path, load_step=2)).checkpoints.start.step == 2


def test_retention(tmp_path):
    run = a_run(tmp_path, steps=8, interval=1, keep_latest_k=2, keep_every=5, keep_steps=[3], keep_best_k=1)
    run.validator.enable, run.validator.freq = True, 4
    go(to_json(run))
    kept = steps_in(Storage(tmp_path / "run/checkpoint"))
    losses = {record["step"]: record["validation_loss"] for record in measured(tmp_path / "run")}
    assert losses[8] < losses[4] and kept == [3, 5, 7, 8]


def test_settings_that_contradict_each_other():
    for settings, said in (
        ({"enable": False, "load_only": True}, "load_only is set and enable is not"),
        ({"interval": 0}, "interval 0 must be at least 1"),
        ({"load_step": 3, "resume": "never"}, "exclude each other"),
        ({"last_save_in_hf": True}, "last_save_in_hf needs last_save_model_only"),
        ({"initial_load_in_hf": True}, "initial_load_in_hf needs initial_load_path"),
        ({"export_dtype": "bfloat16"}, "needs last_save_model_only"),
        ({"keep_best_k": -1}, "must not be negative"),
        ({"folder": ""}, "folder is empty"),
    ):
        problems = list(Checkpoint(**{"enable": True, **settings}).problems())
        assert any(said in message for _, message in problems), (settings, problems)
    assert not list(Checkpoint(enable=True).problems())


def test_a_run_does_not_begin_with_the_weights_of_another_class(tmp_path):
    """Names and shapes alone would let them in."""
    folder = tmp_path / "weights"
    save_weights(on_cpu(Toy.Config(vocab_size=2048)), folder)
    assert begun(a_run(tmp_path / "a", initial_load_path=str(folder))).checkpoints.start.step == 0
    stated = (folder / "config.json").read_text()
    (folder / "config.json").write_text(stated.replace("core.testing.toy:Toy", "core.testing.toy:ToyMoE"))
    text = refusal(a_run(tmp_path / "b", initial_load_path=str(folder)))
    assert "holds the weights of core.testing.toy:ToyMoE, not of core.testing.toy:Toy" in text


def test_a_checkpoint_of_another_model(tmp_path):
    trained(tmp_path)
    run = a_run(tmp_path, steps=6, allow_config_change=True)
    run.model = Toy.Config(vocab_size=2048, n_layers=3, dim=run.model.dim * 2)
    text = refusal(run)
    assert (
        "does not fit this run" in text and "model.layers.2." in text and "is missing" in text and "has shape" in text
    )
