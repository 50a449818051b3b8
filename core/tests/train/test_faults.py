"""What goes wrong with a run and its checkpoints: the last good one can be loaded, and the message says what to do."""

import functools
import hashlib
import importlib
import json
import logging
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from errno import EACCES
from pathlib import Path

import pytest
import torch
from faulty_run import LIMIT_S, N_STEPS, Fault, Launched, kill_at, saved_run

from core.checkpoint.find import find_checkpoint, inspect
from core.checkpoint.index import read_tensor
from core.checkpoint.manifest import LAYOUT, Damaged, Progress, manifest_digest, read_manifest
from core.checkpoint.saver import Saver
from core.checkpoint.settings import Checkpoint
from core.checkpoint.storage import Storage, steps_in
from core.config.errors import UserError
from core.config.record import to_json
from core.runtime.ranks import Ranks
from core.testing.ranks import run_ranks
from core.train.trainer import Trainer

HERE = Path(__file__).parent


def hashes(folder: Path, step: int) -> dict[str, str]:
    """The hashes of the tensors of a checkpoint, by file."""
    files = (folder / f"checkpoint/step-{step}").glob("*.safetensors")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def train(run: Trainer.Config, **changes: object) -> None:
    """Train in this process, with other settings of its checkpoints."""
    for name, value in changes.items():
        setattr(run.checkpoint, name, value)
    run.build().run()


def refusal(run: Trainer.Config, **changes: object) -> str:
    """What the user is told of a run that cannot begin."""
    with pytest.raises(UserError) as error:
        train(run, **changes)
    return str(error.value)


def whole_step(run: Trainer.Config) -> int:
    """The step of the checkpoint that a run goes on from."""
    assert run.dump_folder is not None
    found = find_checkpoint(run.checkpoint, run.checkpoint.storage(run.dump_folder), Ranks())
    return found.manifest.progress.step if found else 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the text is, tokenised once."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def expected(folder) -> Callable[[int], dict[str, str]]:
    """The hashes of the last checkpoint of runs that nothing happens to, by the number of ranks."""
    known: dict[int, dict[str, str]] = {}

    def get(n_ranks: int) -> dict[str, str]:
        if n_ranks not in known:
            run = saved_run(folder, f"undisturbed-{n_ranks}")
            ended = Launched(run, n_ranks=n_ranks).end()
            assert ended.codes == [0] * n_ranks, ended.texts
            known[n_ranks] = hashes(Path(str(run.dump_folder)), N_STEPS)
        return known[n_ranks]

    return get


@pytest.fixture
def run(folder, tmp_path) -> Trainer.Config:
    """A run in a folder of its own."""
    run = saved_run(folder)
    run.dump_folder = str(tmp_path / "run")
    return run


@pytest.fixture
def saved(run, expected, folder) -> Trainer.Config:
    """A run with checkpoints of steps 2, 4 and 6."""
    expected(1)
    shutil.copytree(folder / "undisturbed-1", Path(str(run.dump_folder)))
    return run


def check_goes_on(run: Trainer.Config, expected: dict[str, str], n_ranks: int) -> None:
    """A run, started again without its fault, ends where one ends that nothing happened to."""
    ended = Launched(run, n_ranks=n_ranks).end()
    assert ended.codes == [0] * n_ranks, ended.texts
    assert hashes(Path(str(run.dump_folder)), run.training.steps) == expected
    assert not [name for name in os.listdir(f"{run.dump_folder}/checkpoint") if name.endswith(".tmp")]


# Killed


def state(step: int) -> dict[str, torch.Tensor]:
    values = torch.arange(6_000.0).reshape(3, 2_000) + step
    return {"model.first": values, "model.second": -values, "random.0.cpu": torch.full((9,), step, dtype=torch.uint8)}


def saver_in(folder: Path) -> Saver:
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    settings = Checkpoint(enable=True, keep_latest_k=1)
    return Saver(settings, Ranks(), run_folder=folder, config="{}", export=lambda found, path: None)


def save(folder: Path, step: int) -> None:
    saver_in(folder).save(Progress(step=step), state(step), kind="full", wait=True)


def killed(moment: int, folder: Path) -> bool:
    """Save step 2 in a process that is killed at that moment; returns whether it lived so long."""
    if (pid := os.fork()) == 0:
        kill_at(moment)
        save(folder, 2)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL), status
    return status != 0


def kill_everywhere(folder: Path) -> list[int]:
    """The steps that are found whole after a kill at each moment of the save of step 2."""
    found: list[int] = []
    while True:
        save(folder, 1)
        if not killed(len(found) + 1, folder):
            return found
        saver = saver_in(folder)
        good = saver.find()
        assert good is not None
        step = good.manifest.progress.step
        index = good.tensors()
        for name, values in state(step).items():
            assert torch.equal(read_tensor(good.storage, good.folder, index[name]), values)
        for other in steps_in(good.storage):
            inspect(good.storage, f"step-{other}", Ranks())  # raises where a part of a checkpoint bears its name
        saver.set_aside(step)
        assert all(re.fullmatch(r"(replaced-)?step-[\d-]+", name) for name in os.listdir(folder / "checkpoint"))
        save(folder, step + 1)
        assert os.listdir(folder / "checkpoint") == [f"step-{step + 1}"]
        found.append(step)
        shutil.rmtree(folder)


def test_a_save_may_be_killed_at_any_system_call(tmp_path):
    (found,) = run_ranks(kill_everywhere, 1, tmp_path / "run")
    assert found == sorted(found) and found.count(1) > 10 and found.count(2) > 3


def undisturbed_hashes(folder: Path, n_ranks: int, n_steps: int) -> dict[int, dict[str, str]]:
    """The hashes of the checkpoint of every step of a run that nothing happens to."""
    run = saved_run(folder, f"every-step-{n_ranks}", n_steps=n_steps)
    run.checkpoint.interval, run.checkpoint.keep_latest_k = 1, 0
    ended = Launched(run, n_ranks=n_ranks).end()
    assert ended.codes == [0] * n_ranks, ended.texts
    return {step: hashes(Path(str(run.dump_folder)), step) for step in range(1, n_steps + 1)}


def kill_again_and_again(
    run: Trainer.Config, expected: dict[int, dict[str, str]], victims: tuple[int, ...], n_kills: int
) -> str:
    """Kill ranks of a run that is saved at every step, at random moments, and have it go on after each kill.

    What it finds to go on from is what a run has there that nothing happens to. Says what was hit.
    """
    run.checkpoint.interval, run.checkpoint.keep_latest_k = 1, 2
    n_ranks, last = len(expected[1]), run.training.steps
    home = Path(str(run.dump_folder))
    draw = random.Random(str(victims))
    in_saves, before = 0, 0
    for _ in range(n_kills):
        run.checkpoint.async_mode = draw.choice(["disabled", "async"])
        launched = Launched(run, n_ranks=n_ranks)
        launched.says(f"step {before + 1:>{len(str(last))}}/{last}")
        if before == 0:  # records without a checkpoint are no run to go on with
            launched.until((home / "checkpoint/step-1").exists)
        time.sleep(draw.uniform(0, 0.3))
        launched.send(signal.SIGKILL, *victims)
        ended = launched.end(grace_s=0.5)
        assert all(ended.codes[rank] == -signal.SIGKILL for rank in victims), ended.texts
        in_saves += any(name.endswith(".tmp") for name in os.listdir(home / "checkpoint"))
        after = whole_step(run)
        assert after >= before and (after == 0 or hashes(home, after) == expected[after])
        before = after
        if after > last - 20:
            shutil.rmtree(home)
            before = 0
    check_goes_on(run, expected[last], n_ranks)
    return f"killed {len(victims)} of {n_ranks} ranks {n_kills} times, {in_saves} times in the middle of a save"


VICTIMS = pytest.mark.parametrize(
    ("n_ranks", "victims"), [(1, (0,)), (2, (1,)), (2, (0, 1))], ids=["alone", "one of two", "both"]
)


@pytest.fixture(scope="module")
def every_step(folder) -> Callable[[int, int], dict[int, dict[str, str]]]:
    """The hashes of runs that nothing happens to, by the number of ranks and steps."""
    return functools.cache(functools.partial(undisturbed_hashes, folder))


def test_a_killed_run_goes_on(run, every_step):
    run.training.steps = 30
    print(kill_again_and_again(run, every_step(2, 30), (1,), 2))


@pytest.mark.faults
@VICTIMS
def test_a_run_that_is_killed_fifty_times_goes_on(run, every_step, n_ranks, victims):
    run.training.steps = 100
    print(kill_again_and_again(run, every_step(n_ranks, 100), victims, 50))


@pytest.mark.slow
def test_torchrun_goes_on_by_itself_after_a_rank_was_killed(run, expected, tmp_path):
    file = tmp_path / "run.json"
    file.write_text(to_json(run))
    fault = {"kind": "SIGKILL", "rank": 1, "step": 5, "once": str(tmp_path / "happened")}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": json.dumps(fault)}
    done = subprocess.run(
        [*command, str(HERE / "faulty_run.py"), "--config", str(file)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=3 * LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert f"going on from {run.dump_folder}/checkpoint/step-4 after step 4" in done.stdout
    assert hashes(Path(str(run.dump_folder)), N_STEPS) == expected(2)


# Signals


@pytest.mark.parametrize(("n_ranks", "name", "mode"), [(1, "SIGINT", "disabled"), (2, "SIGTERM", "async")])
def test_a_signal_saves_after_the_step_and_ends_all_ranks_well(run, expected, n_ranks, name, mode):
    run.checkpoint.async_mode = mode
    ended = Launched(run, n_ranks=n_ranks, fault=Fault(name, rank=n_ranks - 1, step=3)).end()
    assert ended.codes == [0] * n_ranks, ended.texts
    cause = name if n_ranks == 1 else "a signal to another rank"
    assert f"stopped by {cause} after step 3 of 6" in ended.texts[0]
    assert "  checkpoint/step-3  weights and optimizer, " in ended.texts[0]
    assert whole_step(run) == 3
    check_goes_on(run, expected(n_ranks), n_ranks)


def test_a_second_signal_ends_at_once_and_leaves_the_checkpoint_before(run, expected):
    launched = Launched(run, n_ranks=2, fault=Fault("hang", rank=1))
    launched.until((Path(str(run.dump_folder)) / "checkpoint/step-4.tmp/rank-00001.safetensors").exists)
    launched.send(signal.SIGTERM)
    time.sleep(0.5)
    assert all(process.is_alive() for process in launched.processes)
    launched.send(signal.SIGTERM)
    ended = launched.end()
    assert ended.codes[1] == -signal.SIGTERM and ended.codes[0] in (-signal.SIGTERM, 1)
    assert whole_step(run) == 2
    check_goes_on(run, expected(2), 2)


# Disks and writers that fail


@pytest.mark.parametrize(("n_ranks", "mode"), [(1, "async"), (2, "disabled")])
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(run, expected, n_ranks, mode):
    ended = Launched(run, "--checkpoint.async_mode", mode, n_ranks=n_ranks, fault=Fault("full", rank=n_ranks - 1)).end()
    assert ended.codes == [2] * n_ranks, ended.texts
    where = " on rank 1" if n_ranks > 1 else ""
    for text in ended.texts:
        words = f"checkpoint/step-4 could not be saved{where}: No space left on device. The checkpoints before it are"
        assert words in text
    assert "Traceback" not in "".join(ended.texts) and whole_step(run) == 2
    check_goes_on(run, expected(n_ranks), n_ranks)


def test_a_disk_that_keeps_other_bytes_is_found_out(run):
    ended = Launched(run, fault=Fault("lie")).end()
    assert ended.codes == [2]
    assert "checkpoint/step-4 could not be saved: other bytes are read there than were written" in ended.texts[0]
    assert whole_step(run) == 2


def test_a_writer_that_crashes_behind_the_run_ends_all_ranks_at_a_later_step(run):
    run.training.steps, run.checkpoint.interval, run.checkpoint.async_mode = 60, 20, "async"
    ended = Launched(run, n_ranks=2, fault=Fault("crash", rank=1, step=40)).end()
    assert ended.codes == [1, 1]
    for text in ended.texts:
        assert re.search(r"RuntimeError: the writer stumbled\n.*on rank 1$", text, re.MULTILINE)
    assert "step 40/60" in ended.texts[0] and "step 60/60" not in ended.texts[0]
    assert whole_step(run) == 20


def test_a_folder_without_permission_is_refused_before_the_first_step(run, monkeypatch):
    def forbid(*args: object, **kwargs: object) -> None:
        raise PermissionError(EACCES, os.strerror(EACCES))

    def make(folder: Path, *args: object, **kwargs: object) -> None:
        forbid() if folder.name == "checkpoint" else mkdir(folder, *args, **kwargs)

    mkdir, folder = Path.mkdir, f"{run.dump_folder}/checkpoint"
    text = refusal(run, folder="/proc/checkpoint")
    assert (
        text == "cannot write in /proc/checkpoint: No such file or directory; choose another with --checkpoint.folder"
    )
    run.checkpoint.folder = "checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "names", forbid)
        assert refusal(run) == f"{folder} cannot be read: Permission denied"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", make)
        assert refusal(run) == f"cannot write in {folder}: Permission denied; choose another with --checkpoint.folder"
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "make", forbid)
        words = f"no checkpoint can be written in {folder}: Permission denied (rank 0); choose another with"
        assert refusal(run).startswith(words) and not (Path(str(run.dump_folder)) / "metrics.jsonl").exists()


def test_two_runs_in_one_folder(run, tmp_path):
    first = Launched(run, fault=Fault("hang"))
    checkpoints = Path(str(run.dump_folder)) / "checkpoint"
    first.until((checkpoints / "step-4.tmp/rank-00000.safetensors").exists)
    holder = f"in use by process {first.processes[0].pid} on {socket.gethostname()}: wait until it ends, or choose"
    text = refusal(run)
    assert holder in text and "--dump_folder" in text
    run.dump_folder = str(tmp_path / "other")
    text = refusal(run, folder=str(checkpoints))
    assert holder in text and "--checkpoint.folder" in text
    assert (checkpoints / "step-4.tmp").exists()
    first.send(signal.SIGKILL)
    first.end()
    assert whole_step(run) == 2


# Checkpoints that are damaged


def cut(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)


def flip(file: Path, at: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "cut": ("rank-00000.safetensors", cut, "has 868,491 bytes, not 868,492"),
    "cut to nothing": ("rank-00000.safetensors", lambda file: os.truncate(file, 0), "has 0 bytes, not 868,492"),
    "first byte": ("rank-00000.safetensors", lambda file: flip(file, 0), "has other bytes than were written"),
    "a byte": ("rank-00000.safetensors", lambda file: flip(file, 0.6), "has other bytes than were written"),
    "last byte": ("rank-00000.safetensors", lambda file: flip(file, 1), "has other bytes than were written"),
    "a byte of the index": ("tensors.json", lambda file: flip(file, 0.5), "has other bytes than were written"),
    "a byte of the settings": ("config.json", lambda file: flip(file, 0.5), "has other bytes than were written"),
    "manifest cut": ("manifest.json", lambda file: os.truncate(file, 100), "is not JSON: "),
    "manifest empty": ("manifest.json", lambda file: os.truncate(file, 0), "is not JSON: "),
    "no tensors": ("rank-00000.safetensors", os.remove, "is missing"),
    "no index": ("tensors.json", os.remove, "is missing"),
    "no settings": ("config.json", os.remove, "is missing"),
    "no manifest": ("manifest.json", os.remove, "there is no manifest.json: it was never finished"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(saved, caplog, monkeypatch, name):
    file, damage, words = DAMAGES[name]
    newest = Path(f"{saved.dump_folder}/checkpoint/step-6")
    damage(newest / file)
    monkeypatch.setattr(logging.getLogger("armature"), "handlers", [caplog.handler])
    monkeypatch.setattr(logging.getLogger("armature"), "propagate", False)
    assert whole_step(saved) == 4
    (said,) = caplog.messages
    assert said.startswith(f"{newest} is damaged and passed over: ") and file in said and words in said
    text = refusal(saved, load_step=6)
    assert text.startswith(f"{newest} is damaged: ") and words in text


def test_a_flipped_bit_in_any_byte_of_a_manifest_is_found(saved):
    storage = Storage(f"{saved.dump_folder}/checkpoint")
    file = Path(storage.root) / "step-6/manifest.json"
    good, said = read_manifest(storage, "step-6"), file.read_bytes()
    for i in range(len(said)):
        data = bytearray(said)
        data[i] ^= 1 << i % 8
        file.write_bytes(data)
        try:
            assert read_manifest(storage, "step-6") == good
        except Damaged:
            pass


def test_a_run_goes_on_from_the_one_before_and_comes_to_the_same_end(saved, expected, capsys):
    cut(Path(f"{saved.dump_folder}/checkpoint/step-6/rank-00000.safetensors"))
    train(saved)
    said = capsys.readouterr().out
    assert "step-6 is damaged and passed over: rank-00000.safetensors has 868,491 bytes" in said
    assert "step-6 is now replaced-step-6-1" in said
    assert hashes(Path(str(saved.dump_folder)), N_STEPS) == expected(1) and whole_step(saved) == N_STEPS


def test_without_one_that_is_whole_nothing_begins_anew(saved):
    for step in (2, 4, 6):
        flip(Path(f"{saved.dump_folder}/checkpoint/step-{step}/tensors.json"), 0.5)
    before = sorted(os.listdir(f"{saved.dump_folder}/checkpoint"))
    text = refusal(saved)
    assert text == (
        f"no checkpoint in {saved.dump_folder}/checkpoint is whole (step-6, step-4, step-2): choose another folder to "
        "begin anew"
    )
    assert sorted(os.listdir(f"{saved.dump_folder}/checkpoint")) == before


def test_an_empty_folder_is_no_run_to_go_on_with(run):
    Path(f"{run.dump_folder}/checkpoint").mkdir(parents=True)
    words = f"checkpoint.resume must, and {run.dump_folder}/checkpoint holds no checkpoint: use auto to begin anew"
    assert refusal(run, resume="must") == words
    shutil.rmtree(str(run.dump_folder))
    assert refusal(run) == words


# Checkpoints of something else


def test_a_checkpoint_of_another_model_is_refused(saved, tmp_path):
    saved.model.dim = 32
    text = refusal(saved)
    assert "checkpoint/step-6 is of another run:\n  model.dim 16 -> 32\nundo that, choose another folder, or" in text
    saved.training.steps = 8
    text = refusal(saved, allow_config_change=True)
    assert "step-6 does not fit this run:" in text
    assert "model.layers.0.attention.wq.weight has shape [32, 16], here [32, 32]" in text
    place, saved.dump_folder = saved.dump_folder, str(tmp_path / "other")
    assert "step-6: the weights are of a model with\n  dim 16" in refusal(saved, initial_load_path=place)
    saved.checkpoint.allow_model_change = True
    text = refusal(saved, initial_load_path=place)
    assert "step-6 does not fit this run:" in text and "\n  and " in text


def test_a_text_that_has_changed_since_is_refused(tmp_path):
    run = saved_run(tmp_path, n_steps=2)
    train(run)
    (tmp_path / "text/100.txt").write_text("one bottle\n")
    assert "step-2 is of another run:\n  the text or the tokenizer has changed since\nundo that" in refusal(run)
    train(run, allow_config_change=True)


def signed(checkpoint: Path, **changes: object) -> None:
    """Change what a manifest says, and have it vouch for that."""
    said = {**json.loads((checkpoint / "manifest.json").read_text()), **changes}
    del said["digest"]
    (checkpoint / "manifest.json").write_text(json.dumps({**said, "digest": manifest_digest(said)}))


def test_a_checkpoint_of_a_newer_layout_is_refused(saved):
    newest = Path(f"{saved.dump_folder}/checkpoint/step-6")
    signed(newest, layout=LAYOUT + 1)
    words = f"{newest} was written in layout {LAYOUT + 1}, and this version reads up to {LAYOUT}: update armature-core"
    assert refusal(saved) == words


# Checkpoints that mean harm


@pytest.mark.parametrize("name", ["../run.json", "/etc/hostname", "hf/../../../run.json", "..", "..\\run.json"])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(saved, name):
    newest = Path(f"{saved.dump_folder}/checkpoint/step-6")
    signed(newest, files={name: {"n_bytes": 1, "crc32": "0" * 8}})
    assert whole_step(saved) == 4
    assert f"manifest.json names {name!r}, which is no file in the folder" in refusal(saved, load_step=6)


@pytest.mark.parametrize("name", ["../step-4/rank-00000.safetensors", "/etc/hostname", ".."])
def test_an_index_that_names_a_file_elsewhere_is_refused(saved, name):
    newest = Path(f"{saved.dump_folder}/checkpoint/step-6")
    index = (newest / "tensors.json").read_text().replace("rank-00000.safetensors", name)
    (newest / "tensors.json").write_text(index)
    written = {"n_bytes": len(index), "crc32": f"{zlib.crc32(index.encode()):08x}"}
    signed(newest, files={**json.loads((newest / "manifest.json").read_text())["files"], "tensors.json": written})
    assert whole_step(saved) == 4
    assert f"{name!r} is no file of this checkpoint" in refusal(saved, load_step=6)


class Bomb:
    def __reduce__(self) -> tuple:
        return os._exit, (86,)


def test_nothing_is_unpickled(saved, expected, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("unpickled")

    checkpoints = Path(f"{saved.dump_folder}/checkpoint")
    shutil.rmtree(checkpoints / "step-6")
    for name in (".metadata", "rank.pt", "__0_0.distcp"):
        (checkpoints / "step-4" / name).write_bytes(pickle.dumps(Bomb()))
    importlib.import_module("torch._dynamo")  # makes a class of an unpickler
    for module in (pickle, torch.serialization.pickle, torch):
        for name in ("load", "loads", "Unpickler"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, refuse)
    train(saved)
    assert hashes(checkpoints.parent, N_STEPS) == expected(1)
