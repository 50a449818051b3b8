"""A run: what it checks first, what it writes, that it repeats, and how it ends."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy_run import VERSES, toy_run

from core.activation_checkpoint.region import is_recomputing
from core.config.errors import UserError
from core.config.record import from_json, to_json
from core.config.validate import validate
from core.data.packing import IGNORE
from core.data.sampling import held_out
from core.data.text import IndexedText, StreamedText
from core.nn.balance import routers
from core.nn.kernel import Positions
from core.step.assemble import expert_loads
from core.step.settings import Compile, Debug, Training
from core.testing.activation_checkpoint import autograd_bytes
from core.testing.toy import ToyMoE
from core.train import folder, memory, trainer
from core.train.debug_run import debug_run
from core.train.metrics import Record
from core.train.outcome import command
from core.train.profile import Profiler
from core.train.step_report import console_fields
from core.train.validate import Validator

FIELDS = set(Record.__dataclass_fields__) - {"numbers"}


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(config) -> list[dict]:
    validate(config)
    config.build().run()
    return metrics(Path(config.dump_folder))


def test_run_writes_its_record_and_learns(tmp_path, capsys):
    config = toy_run(tmp_path, steps=40)
    config.metrics.log_freq = 10
    records = run(config)
    assert [r["step"] for r in records] == [1, 10, 20, 30, 40]
    assert all(set(r) == FIELDS for r in records)
    first, last = records[0], records[-1]
    assert first["loss"] == pytest.approx(math.log(2048), abs=0.3)
    assert last["loss"] < first["loss"] - 2
    assert last["tokens"] == 40 * 4 * 16
    assert last["mfu"] is None and last["validation_loss"] is None
    assert last["tokens_per_second"] == pytest.approx(4 * 16 / last["step_time_s"])
    assert 0.01 < last["memory_gib"] < 30
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for part in ("parameters", "FLOPs", "180 documents", "bundled", "cpu", "config.json", "eta 0:00"):
        assert part in out


def test_config_is_written_before_the_first_step_and_repeats_the_run(tmp_path, monkeypatch):
    config = toy_run(tmp_path)

    def stop(*args, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            config.build().run()
    written = Path(config.dump_folder)
    again = from_json((written / "config.json").read_text())
    config.training.mask = "causal"  # what auto stands for
    assert again == config and metrics(written) == []
    results = []
    for name in "ab":
        again.dump_folder = str(tmp_path / name)
        results.append([(r["loss"], r["grad_norm"], r["lr"]) for r in run(again)])
    assert results[0] == results[1]
    again.dump_folder, again.debug.seed = str(tmp_path / "c"), 1
    assert [(r["loss"], r["grad_norm"], r["lr"]) for r in run(again)] != results[0]


def test_accumulation_gives_the_same_run(tmp_path):
    whole = toy_run(tmp_path, steps=5)
    split = toy_run(tmp_path, steps=5)
    split.dump_folder = str(tmp_path / "split")
    split.training.local_batch_size, split.training.global_batch_size = 1, 4
    for a, b in zip(run(whole), run(split), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert b["tokens"] == a["tokens"]


def test_validation_weighs_every_token_alike(tmp_path):
    config = toy_run(tmp_path, steps=3)
    config.validator = Validator.Config(enable=True, freq=2)
    config.metrics.log_freq = 100
    config.training.mask = "document"
    run_ = config.build()
    run_.run()
    records = metrics(Path(config.dump_folder))
    assert [r["step"] for r in records] == [1, 2, 3]
    assert [r["validation_loss"] is None for r in records] == [True, False, False]
    loader, total, count = run_._open(config.dataloader, "validation"), 0.0, 0
    for row in range(loader.rows_per_epoch):
        batch = loader.read(row, 1)
        with torch.no_grad():
            logits = run_.built.models[0](batch.tokens_BL, Positions(batch.positions_BL, batch.documents_BL))[
                0
            ].double()
        for position, label in enumerate(batch.labels_BL[0].tolist()):
            if label != IGNORE:
                total -= logits[position].log_softmax(-1)[label].item()
                count += 1
    assert records[-1]["validation_loss"] == pytest.approx(total / count, rel=1e-6)
    left, n_bytes = loader.rows_per_epoch * 16 + 1, 0
    for verse, held in zip(VERSES, held_out(0, len(VERSES), 0.1), strict=True):
        if held:
            ids = run_.tokenizer.encode_documents([verse])[0]
            n_bytes += len(verse if left >= len(ids) else run_.tokenizer.decode(ids[:left]))
            left = max(left - len(ids), 0)
    bits = total / math.log(2) / n_bytes
    assert records[-1]["validation_bits_per_byte"] == pytest.approx(bits, rel=1e-6) and 1 < bits < 20
    assert run_.built.models[0].training


def test_validation_gives_up_half_way_when_asked(tmp_path):
    config = toy_run(tmp_path)
    config.validator = Validator.Config(enable=True)
    run_ = config.build()
    assert len(run_.validator.stretches[0].rows) > 2 * run_.validator.rows_per_step
    answers = iter([False, True])
    assert run_.validator.measure(lambda: next(answers)) is None
    assert run_.built.models[0].training


def test_data_bound_the_run(tmp_path, capsys):
    config = toy_run(tmp_path, steps=10_000)
    config.dataloader.epochs = 1
    run_ = config.build()
    rows = run_.loader.n_rows
    assert run_.last_step == rows // 4 < 10_000
    run_.run()
    said = " ".join(capsys.readouterr().out.split())
    assert f"the data last for {rows // 4:,} of 10,000 steps" in said
    config.dump_folder, config.training.local_batch_size = str(tmp_path / "b"), rows + 1
    with pytest.raises(UserError, match=f"the data have {rows} rows of 16 tokens, one step takes {rows + 1}"):
        config.build()


def test_existing_run_is_not_overwritten(tmp_path):
    config = toy_run(tmp_path, steps=1)
    before = run(config)
    with pytest.raises(UserError, match="already holds a run"):
        config.build()
    assert metrics(Path(config.dump_folder)) == before


def test_a_taken_folder_is_told_before_anything_is_prepared(tmp_path):
    config = toy_run(tmp_path)
    for wrong in ("", str(tmp_path / "text/000.txt")):
        config.dump_folder = wrong
        with pytest.raises(UserError, match="is not a folder: choose another with --dump_folder"):
            config.build()
    assert not (tmp_path / "cache").exists()
    config.dump_folder = str(tmp_path / "text/000.txt/below")
    with pytest.raises(UserError, match="cannot make the run's folder .*below: File exists; choose another"):
        config.build()


def test_every_run_gets_a_folder_of_its_own_named_after_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = folder.make_run_folder(None, "toy")
    assert re.fullmatch(r"outputs/toy-\d{8}-\d{6}", str(first)) and first.is_dir()
    monkeypatch.setattr(folder.time, "strftime", lambda form: first.name.removeprefix("toy-"))
    others = [folder.make_run_folder(None, "toy") for _ in range(2)]
    assert others == [first.with_name(f"{first.name}-{n}") for n in (2, 3)] and all(f.is_dir() for f in others)


def test_vocabulary_must_fit(tmp_path):
    config = toy_run(tmp_path)
    config.model.vocab_size = 1000
    with pytest.raises(UserError, match="the tokenizer has 2,048 tokens, model.vocab_size is 1,000: set --model.vocab"):
        config.build()
    assert not Path(config.dump_folder).exists()


def test_a_model_that_cannot_fit_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    config = toy_run(tmp_path)
    config.dataloader.dataset = "/nowhere"
    config.training.seq_len = config.model.max_seq_len
    monkeypatch.setattr(memory, "free_memory", lambda device: 10 * 2**20)
    config.model.dim = 4096
    with pytest.raises(UserError) as caught:
        config.build()
    for part in ("needs at least", "cpu has 10.00 MiB free", "weights", "--training.dtype bfloat16", "debug recipe"):
        assert part in str(caught.value)


def test_memory_that_runs_out_later_is_told_with_the_mend(tmp_path, monkeypatch):
    config = toy_run(tmp_path)

    def too_much(*args, **settings):
        raise torch.OutOfMemoryError("tried to allocate 7 GiB")

    monkeypatch.setattr(trainer, "train_step", too_much)
    with pytest.raises(UserError, match="cpu ran out of memory: tried to allocate 7 GiB") as caught:
        config.build().run()
    assert "--training.local_batch_size 1 --training.global_batch_size 4" in str(caught.value)
    assert "--activation_checkpoint.mode full" in str(caught.value)


def test_weights_in_bfloat16_compute_in_bfloat16(tmp_path, capsys):
    config = toy_run(tmp_path, steps=2)
    config.training.dtype = "bfloat16"
    assert all(math.isfinite(r["loss"]) for r in run(config))
    assert "weights bfloat16, compute bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dtype", "chosen", "device", "compute"),
    [
        ("float32", "auto", "cpu", torch.float32),
        ("float32", "auto", "cuda", torch.bfloat16),
        ("float32", "bfloat16", "cpu", torch.bfloat16),
        ("float32", "float32", "cuda", torch.float32),
        ("bfloat16", "auto", "cpu", torch.bfloat16),
        ("bfloat16", "auto", "cuda", torch.bfloat16),
    ],
)
def test_compute_dtype(dtype, chosen, device, compute):
    training = Training(dtype=dtype, mixed_precision_param=chosen)
    assert training.compute_dtype(torch.device(device)) == compute


def test_estimate_is_what_the_tensors_take(tmp_path):
    config = toy_run(tmp_path, steps=1)
    run_ = config.build()
    need = memory.estimate(run_.built.models[0], config.optimizer, config.loss, config.training)
    run_.run()
    weights = sum(p.numel() * p.element_size() for p in run_.built.models[0].parameters())
    moments = sum(tensor.nbytes for state in run_.optimizer.state.values() for tensor in state.values())
    assert need.weights == weights and need.gradients == sum(p.grad.nbytes for p in run_.built.models[0].parameters())
    assert need.optimizer == moments and need.loss == (4 * 16 + config.model.dim) * 2048 * 4


def test_ranks_without_a_launcher_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE set without RANK, LOCAL_RANK: start with torchrun"):
        toy_run(tmp_path).build()


def test_flex_cannot_train_on_a_cpu(tmp_path):
    config = toy_run(tmp_path)
    config.model.attention.backend = "flex"
    with pytest.raises(UserError, match="cannot train on a cpu: use --model.attention.backend sdpa"):
        config.build()


def test_every_mistake_is_told_at_once(tmp_path):
    config = toy_run(tmp_path)
    config.training.seq_len = 65
    config.training.global_batch_size = 6
    config.model.attention.n_kv_heads = 3
    config.validator.steps = 0
    config.optimizer.lr = -1.0
    with pytest.raises(UserError) as caught:
        validate(config)
    text = str(caught.value)
    for path in (
        "training.seq_len: seq_len 65 exceeds model.max_seq_len 64",
        "training.global_batch_size: global_batch_size 6 must be a multiple of local_batch_size 4",
        "model.attention.n_kv_heads: n_kv_heads 3 must divide n_heads 4",
        "validator.steps: steps 0",
        "optimizer.lr: lr -1.0",
    ):
        assert path in text


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("training", Training(max_norm=math.nan), "training.max_norm: max_norm nan must be above 0"),
        (
            "training",
            Training(dtype="bfloat16", mixed_precision_param="float32"),
            "training.mixed_precision_param: .*set dtype float32, or auto here",
        ),
        ("compile", Compile(enable=True, components=[]), "compile.components: .*name model, loss or both"),
        ("compile", Compile(enable=True, backend="nvcc"), "compile.backend: backend nvcc is not known .*inductor"),
        ("training", Training(max_norm=0.0), "training.max_norm: max_norm 0.0 must be above 0; inf leaves"),
        ("training", Training(max_value=0.1), "training.max_value: max_value 0.1 and max_norm 1.0: choose one"),
        ("training", Training(fixed_norm=0.5), "training.fixed_norm: .* 0.5 must be finite and above max_norm 1.0"),
        ("debug", Debug(seed=-1), r"debug.seed: seed -1 must be from 0 to 2\^63 - 1"),
        ("debug", Debug(seed=2**63), r"debug.seed: a whole number must be from -2\^63 to 2\^63 - 1"),
        ("debug", Debug(detect_anomaly=True, on_nonfinite="skip"), "debug.on_nonfinite: .*choose one"),
        ("profiling", Profiler.Config(profiler_warmup=-1), "profiling.profiler_warmup: .*at least 0"),
        ("validator", Validator.Config(enable=True), "dataloader.validation_fraction: .*raise it, or --validator.no-"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, section, value, message):
    config = toy_run(tmp_path)
    config.training.seq_len = 8
    config.dataloader.validation_fraction = 0.0
    setattr(config, section, value)
    with pytest.raises(UserError, match=message):
        validate(config)


def test_skipped_steps_are_reported(tmp_path, capsys):
    config = toy_run(tmp_path, steps=2)
    config.debug.on_nonfinite = "skip"
    run_ = config.build()
    run_.built.models[0].norm.weight.register_hook(lambda gradient: gradient * math.inf)
    run_.run()
    assert "warning: step 2 left out" in capsys.readouterr().out
    lines = (run_.folder / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [r["grad_norm"] for r in strict] == [None, None] and all(math.isfinite(r["loss"]) for r in strict)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks a block's input
def test_compiled_run_equals_the_eager_one(tmp_path):
    eager, compiled = toy_run(tmp_path, steps=3), toy_run(tmp_path, steps=3)
    compiled.dump_folder = str(tmp_path / "compiled")
    compiled.compile.enable, compiled.compile.backend = True, "aot_eager"
    for a, b in zip(run(eager), run(compiled), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("mask", ["causal", "document"])
def test_every_checkpointing_mode_is_the_same_run(tmp_path, mask):
    found = {}
    for mode in ("none", "selective", "full"):
        config = toy_run(tmp_path, steps=3)
        config.dump_folder, config.training.mask = str(tmp_path / mode), mask
        config.activation_checkpoint.mode = mode
        found[mode] = [(r["loss"], r["grad_norm"]) for r in run(config)]
    assert len(found["none"]) == 3
    assert found["selective"] == found["full"] == found["none"]


@pytest.fixture
def functorch():
    """torch's settings of its memory budget, put back after the test."""
    from torch._functorch import config

    names = ("activation_memory_budget", "visualize_memory_budget_pareto", "memory_budget_pareto_dir")
    before = {name: getattr(config, name) for name in names}
    torch._dynamo.reset()
    yield config
    for name, value in before.items():
        setattr(config, name, value)
    torch._dynamo.reset()


def compiled_with_budget(config, budget):
    """A compiled run of two steps, and the bytes that autograd keeps in its first forward."""
    torch._dynamo.reset()
    config.compile.enable, config.compile.backend, config.compile.components = True, "aot_eager", ["model"]
    config.activation_checkpoint.mode = "memory_budget"
    config.activation_checkpoint.memory_budget = budget
    validate(config)
    run_ = config.build()
    saved = autograd_bytes(lambda: run_.objective(run_.batches(1)[0]))
    run_.run()
    return [(r["loss"], r["grad_norm"]) for r in metrics(run_.folder)], saved


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks a block's input
def test_memory_budget_saves_less_and_computes_the_same(tmp_path, functorch):
    plain = toy_run(tmp_path, steps=2)
    plain.activation_checkpoint.mode = "none"
    expected = [(r["loss"], r["grad_norm"]) for r in run(plain)]
    saved = {}
    for budget in (1.0, 0.0):
        config = toy_run(tmp_path, steps=2)
        config.dump_folder = str(tmp_path / f"budget-{budget}")
        found, saved[budget] = compiled_with_budget(config, budget)
        assert functorch.activation_memory_budget == budget
        assert functorch.visualize_memory_budget_pareto is False
        assert not (tmp_path / f"budget-{budget}/memory_budget_pareto").exists()
        for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
    assert saved[0.0] < saved[1.0]


@pytest.mark.parametrize(("enable", "components"), [(False, ["model", "loss"]), (True, ["loss"])])
def test_memory_budget_needs_a_compiled_model(tmp_path, enable, components):
    config = toy_run(tmp_path)
    config.activation_checkpoint.mode = "memory_budget"
    config.compile.enable, config.compile.components = enable, components
    with pytest.raises(UserError, match="activation_checkpoint.mode: memory_budget .* add --compile.enable with model"):
        validate(config)
    config.compile.enable, config.compile.components = True, ["model"]
    validate(config)


def test_checkpointing_reports_after_the_first_step(tmp_path, capsys):
    config = toy_run(tmp_path, steps=2)
    config.activation_checkpoint.debug = True
    config.activation_checkpoint.save_ops = ["aten.erf.default"]
    run(config)
    out = capsys.readouterr().out
    assert out.count("aten.mm.default saved 8 times") == 1
    assert "warning: activation_checkpoint.save_ops: aten.erf.default was never dispatched" in out
    assert out.index("saved 8 times") < out.index("step 2/2")


def test_tensorboard_and_traces(tmp_path, capsys):
    config = toy_run(tmp_path, steps=4)
    config.metrics.enable_tensorboard = True
    config.profiling.enable_profiling = True
    config.profiling.profile_freq, config.profiling.profiler_warmup = 2, 1
    records = run(config)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tb"))
    events.Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx([r["loss"] for r in records])
    traces = sorted((tmp_path / "run/profile_traces").glob("*.json"))
    assert [t.name for t in traces] == ["step-2-rank-0.json", "step-4-rank-0.json"]
    names = {event["name"] for event in json.loads(traces[0].read_text())["traceEvents"]}
    assert "aten::mm" in names
    table = traces[0].with_suffix(".txt").read_text()
    assert table.rstrip() in (said := capsys.readouterr().out) and "matrix products" in table
    assert f"# see the curve\n{command([['tensorboard'], ['--logdir', str(tmp_path / 'run/tb')]])}\n" in said
    assert "\n  tb              the curve, for TensorBoard\n  profile_traces  traces of steps\n" in said


def test_a_resumed_run_shows_no_step_twice_and_keeps_the_numbers_of_its_traces(tmp_path, monkeypatch):
    """Against a run that never stopped: the curve in TensorBoard, the names of the traces, and the steps in them."""
    config = toy_run(tmp_path, steps=7)
    config.metrics.enable_tensorboard = config.profiling.enable_profiling = True
    config.profiling.profile_freq, config.profiling.profiler_warmup = 3, 1
    config.checkpoint.enable, config.checkpoint.interval = True, 3
    whole = replace(config, dump_folder=str(tmp_path / "whole"))
    expected = run(whole)
    take_step = trainer.Trainer.step

    def fail(trainer, step):
        if step == 5:
            raise KeyboardInterrupt
        return take_step(trainer, step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", fail)
        with pytest.raises(KeyboardInterrupt):
            config.build().run()
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert [(r["step"], r["loss"]) for r in run(config)] == [(r["step"], r["loss"]) for r in expected]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("whole", "run"):
        place = tmp_path / name
        assert len(list((place / "tb").iterdir())) == 1 + (name == "run")
        events = EventAccumulator(str(place / "tb"))
        events.Reload()
        for key in ("loss", "grad_norm", "lr"):
            seen = [(e.step, e.value) for e in events.Scalars(f"train/{key}")]
            assert seen == [(r["step"], pytest.approx(r[key])) for r in expected]
        traces = sorted((place / "profile_traces").glob("*.json"))
        assert [trace.name for trace in traces] == ["step-3-rank-0.json", "step-6-rank-0.json"]
        names = {event["name"] for event in json.loads(traces[1].read_text())["traceEvents"]}
        assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#5"}


def test_missing_logger_is_told_where_it_is_chosen(tmp_path, monkeypatch):
    from core.train import metrics as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    config = toy_run(tmp_path)
    config.metrics.enable_wandb = True
    with pytest.raises(UserError, match="metrics.enable_wandb: .*pip install wandb"):
        validate(config)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_signal_ends_the_run_after_its_step(tmp_path, number):
    config = toy_run(tmp_path, steps=10_000_000)
    config.lr_scheduler.warmup_steps = 10
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from toy_run import toy_run;"
        "config = toy_run(Path(sys.argv[2]), steps=10_000_000); config.build().run()"
    )
    command = [sys.executable, "-u", "-c", code, str(Path(__file__).parent), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stdout.readline, "")
        seen = next(line for line in lines if re.match(r"step +\d+/", line))
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert seen and process.returncode == 0 and not err, err
    last = metrics(Path(config.dump_folder))[-1]["step"]
    assert f"stopped by {number.name} after step {last} of 10000000\n" in out
    assert f"kept in {config.dump_folder}:\n" in out


def test_console_line_shows_what_is_known():
    record = Record(
        mtp_loss=None,
        step=5,
        loss=2.0,
        grad_norm=1.0,
        lr=1e-3,
        tokens=10,
        tokens_per_second=1234.5,
        step_time_s=1,
        memory_gib=2,
        mfu=None,
    )
    line = "  ".join(console_fields(record, 100, 95, accelerated=False))
    assert line == "step   5/100  loss 2.0000  grad 1.00  1.23k tok/s  eta 1:35"
    record.mfu, record.validation_loss, record.validation_bits_per_byte = 0.4321, 1.5, 0.75
    *_, memory, mfu, loss, bits = console_fields(record, 100, 95, accelerated=True)
    assert (memory, mfu, loss, bits) == ("2.00 GiB", "mfu 43.2%", "validation loss 1.5000", "0.750 bits/byte")
    record.grad_norm = 0.004
    assert "grad 4.0e-03" in console_fields(record, 100, 95, accelerated=True)


def test_lines_of_a_step_fit_the_terminal_and_are_one_line_elsewhere(tmp_path, monkeypatch, capsys):
    """Also those of the longest debug run, and every line before and after them."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    config = toy_run(tmp_path, steps=2)
    config.validator, config.training.steps = Validator.Config(enable=True, steps=1), 2
    config.dump_folder = None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("HOME", str(tmp_path))
    config.dataloader.dataset = "text"
    config.build().run()
    (piped,) = re.findall(r"^step 2/2 .*", capsys.readouterr().out, re.MULTILINE)
    assert re.fullmatch(r"step 2/2  loss .*  eta 0:00  validation loss \d\.\d{4}  \d\.\d{3} bits/byte", piped)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Terminal())
        patch.setenv("NO_COLOR", "1")  # without the line that is redrawn
        config.build().run()
        lines = sys.stdout.getvalue().splitlines()
    (i,) = [i for i, line in enumerate(lines) if line.startswith("step 2/2 ")]
    assert lines[i].endswith("eta 0:00") and re.fullmatch(r"    validation loss \S+  \S+ bits/byte", lines[i + 1])
    assert all(len(line) <= 60 for line in lines), max(lines, key=len)


def test_names_for_checkpointing_are_checked_before_anything_is_read(tmp_path):
    config = toy_run(tmp_path)
    config.dataloader.dataset = "/nowhere"
    config.activation_checkpoint.force_recompute = ["attention.query"]
    with pytest.raises(UserError, match="no block has attention.query; it has attention.wq, attention.wk"):
        config.build()


def test_a_streamed_run_reads_its_rows_in_order(tmp_path):
    config = toy_run(tmp_path, steps=3)
    config.dataloader = StreamedText.Config(dataset=str(tmp_path / "text"), validation_fraction=0.1)
    config.validator = Validator.Config(enable=True, freq=3)
    records = run(config)
    assert [r["step"] for r in records] == [1, 2, 3] and records[-1]["validation_loss"] is not None


def test_wandb_gets_the_settings_and_every_record(tmp_path, monkeypatch):
    """A stand-in for the package, which is not installed here, with the calls that we make of it."""
    seen = SimpleNamespace(settings=None, rows=[], ended=0)

    def init(*, dir, config, id, **settings):
        assert dir == str(tmp_path / "run")
        assert json.loads((tmp_path / "run/logger-runs.json").read_text()) == {"wandb": id}
        assert settings == {"project": "mine", "name": None, "tags": ["a"], "mode": "offline", "resume": "allow"}
        seen.settings = config
        return SimpleNamespace(log=lambda row, step: seen.rows.append((step, row)), finish=finish)

    def finish():
        seen.ended += 1

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=sys.__spec__))
    config = toy_run(tmp_path, steps=3)
    config.metrics.enable_wandb = config.metrics.offline = True
    config.metrics.project, config.metrics.tags = "mine", ["a"]
    records = run(config)
    assert seen.settings["training"]["steps"] == 3 and seen.ended == 1
    assert [(step, row["train/loss"]) for step, row in seen.rows] == [(r["step"], r["loss"]) for r in records]


EXPERTS = {  # keys that a model whose blocks 1 and 2 have experts adds to each line
    "moe/layers.1/max_over_mean_load",
    "moe/layers.1/dead_experts",
    "moe/layers.2/max_over_mean_load",
    "moe/layers.2/dead_experts",
    "moe/max_over_mean_load",
    "moe/dead_experts",
}


def moe_run(folder, *, steps=3, **router):
    config = toy_run(folder, steps=steps)
    config.model = ToyMoE.Config(vocab_size=2048, n_layers=3)
    for name, value in router.items():
        setattr(config.model.moe.router, name, value)
    return config


def test_load_of_experts_is_reported(tmp_path):
    """Recounted from the routers of a run that is the same, step by step."""
    config = moe_run(tmp_path, balance_loss_coeff=0.1)
    config.training.local_batch_size, config.training.global_batch_size = 1, 4
    config.validator = Validator.Config(enable=True, freq=1)
    records = run(config)
    assert all(set(r) == FIELDS | EXPERTS | {"moe/balance_loss"} for r in records)
    config.dump_folder = str(tmp_path / "again")
    again = config.build()
    seen = {name: [] for name in routers(again.built.models[0])}
    for name, router in routers(again.built.models[0]).items():
        router.register_forward_hook(
            lambda module, given, out, name=name: None if is_recomputing() else seen[name].append(out.ids_TK)
        )
    for step, record in enumerate(records, start=1):
        for ids in seen.values():
            ids.clear()
        again.step(step)
        worst, dead = [], []
        for name, ids in seen.items():
            assert len(ids) == 4
            chosen = torch.cat(ids).flatten().tolist()
            load = [chosen.count(expert) for expert in range(6)]
            assert sum(load) == 4 * 16 * 2
            worst.append(max(load) / (sum(load) / 6))
            dead.append(load.count(0))
            layer = name.removesuffix(".moe.router")
            assert record[f"moe/{layer}/max_over_mean_load"] == pytest.approx(worst[-1])
            assert record[f"moe/{layer}/dead_experts"] == dead[-1]
        assert record["moe/max_over_mean_load"] == pytest.approx(max(worst))
        assert record["moe/dead_experts"] == sum(dead)
        assert record["moe/balance_loss"] == pytest.approx(
            expert_loads(again.built.models, again.layout)["moe/balance_loss"]
        )


def test_experts_learn(tmp_path):
    records = run(moe_run(tmp_path, steps=20, balance_loss_coeff=0.01))
    assert records[-1]["loss"] < records[0]["loss"] - 1


def test_forced_balance_gives_every_expert_the_same(tmp_path):
    config = moe_run(tmp_path)
    config.training.local_batch_size = 3  # 3 x 16 x 2 choices are 16 for each of 6 experts
    config.debug.moe_force_load_balance = True
    for record in run(config):
        assert {key: record[key] for key in EXPERTS} == {key: float(key.endswith("mean_load")) for key in EXPERTS}


def test_forced_balance_needs_a_router(tmp_path):
    config = toy_run(tmp_path)
    config.debug.moe_force_load_balance = True
    validate(config)
    with pytest.raises(UserError, match="moe_force_load_balance is set, and the model has no router: leave it off"):
        config.build()
    assert not Path(config.dump_folder).exists()


def test_validation_leaves_the_experts_alone(tmp_path):
    config = moe_run(tmp_path, load_balance_coeff=0.1, balance_loss_coeff=0.1)
    config.validator = Validator.Config(enable=True)
    run_ = config.build()
    run_.step(1)
    before = {name: value.clone() for name, value in run_.built.models[0].named_buffers()}
    assert before["layers.1.moe.router.tokens_E"].sum() == 4 * 16 * 2
    assert before["layers.1.moe.router.balance_loss"] > 0 and before["layers.1.moe.router.selection_bias"].any()
    assert run_.validator.measure(lambda: False).loss > 0
    for name, value in run_.built.models[0].named_buffers():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_experts_are_the_same_run(tmp_path, mode):
    found = []
    for chosen in ("none", mode):
        config = moe_run(tmp_path / chosen, load_balance_coeff=0.1, balance_loss_coeff=0.1)
        config.activation_checkpoint.mode = chosen
        measured = {"tokens_per_second", "step_time_s", "data_wait_s", "memory_gib"}
        found.append([{key: value for key, value in r.items() if key not in measured} for r in run(config)])
    assert found[0] == found[1]


def test_laptop_run_is_a_short_run_of_the_model_given():
    model = ToyMoE.Config(vocab_size=2048, max_seq_len=256)
    config = debug_run(model)
    validate(config)
    assert config.model is model and config.validator.enable and config.training.steps <= 1000
    assert config.training.seq_len <= 256 and config.dataloader == IndexedText.Config()
    assert from_json(to_json(config)) == config
