"""Two ranks of one run that differ in one thing: both are told what and how, before anything is built."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from toy_run import toy_run

import core
from core.config.errors import UserError
from core.data.source import StandardLibrary
from core.testing.ranks import run_ranks
from core.testing.toy import ToyMoE
from core.train import identity
from core.train.trainer import Trainer

Run = Trainer.Config


def changed(path: str, value: Any) -> Callable[[Run], None]:
    """Another value of one setting."""

    def change(run: Run) -> None:
        *sections, name = path.split(".")
        node: Any = run
        for section in sections:
            node = getattr(node, section)
        setattr(node, name, value)

    return change


def other_model(run: Run) -> None:
    run.model = ToyMoE.Config(vocab_size=2048)


def other_code(run: Run) -> None:
    """One file of core has a line more than on the other rank."""
    copy = Path(f"{run.dump_folder}-core")
    shutil.copytree(Path(core.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "step/update.py").open("a") as file:
        file.write("# a line more\n")
    core.__path__[:] = [str(copy)]


def other_version(name: str, version: str) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        sys.modules[name].__version__ = version

    return change


def other_python(run: Run) -> None:
    identity.python_version = lambda: "3.10.2"


def other_tokenizer(run: Run) -> None:
    """A copy of the bundled model with one more byte, which the format allows."""
    model = Path(core.__file__).parent / "data/tokenizer.model"
    copy = Path(f"{run.dump_folder}-other.model")
    copy.write_bytes(model.read_bytes() + b"\x9a\x06\x00")
    run.tokenizer.path = str(copy)


def other_text(run: Run) -> None:
    """The standard library of another machine, and a cache of its own."""
    run.dataloader.dataset = "stdlib"
    run.dataloader.cache_folder = f"{run.dump_folder}-cache-of-rank-{dist.get_rank()}"
    library = Path(f"{run.dump_folder}-library-of-rank-{dist.get_rank()}")
    library.mkdir()
    (library / "sums.py").write_text("".join(f"{n} + {n} == {2 * n}\n" for n in range(900 + dist.get_rank())))
    begin = StandardLibrary.__init__
    StandardLibrary.__init__ = lambda self, _: begin(self, StandardLibrary.Config(root=str(library)))


def own_places(run: Run) -> None:
    """What a machine may have of its own."""
    copy = Path(f"{run.dump_folder}-of-rank-1.model")
    copy.write_bytes((Path(core.__file__).parent / "data/tokenizer.model").read_bytes())
    run.tokenizer.path = str(copy)
    run.dataloader.cache_folder = f"{run.dump_folder}-cache-of-rank-1"
    run.dump_folder = f"{run.dump_folder}-of-rank-1"


SETTINGS: dict[str, tuple[str, Any, str]] = {
    "learning rate": ("optimizer.lr", 2e-2, "optimizer.lr: 0.01 (rank 0), 0.02 (rank 1)"),
    "decay": ("optimizer.weight_decay", 0.5, "optimizer.weight_decay: 0.1 (rank 0), 0.5 (rank 1)"),
    "row length": ("training.seq_len", 8, "training.seq_len: 16 (rank 0), 8 (rank 1)"),
    "rows": ("training.local_batch_size", 2, "training.local_batch_size: 4 (rank 0), 2 (rank 1)"),
    "batch": ("training.global_batch_size", 16, "training.global_batch_size: -1 (rank 0), 16 (rank 1)"),
    "steps": ("training.steps", 9, "training.steps: 4 (rank 0), 9 (rank 1)"),
    "precision": ("training.dtype", "bfloat16", "training.dtype: 'float32' (rank 0), 'bfloat16' (rank 1)"),
    "seed": ("debug.seed", 7, "debug.seed: 0 (rank 0), 7 (rank 1)"),
    "shuffle": ("dataloader.shuffle", False, "dataloader.shuffle: True (rank 0), False (rank 1)"),
    "warm-up": ("lr_scheduler.warmup_steps", 1, "lr_scheduler.warmup_steps: 2 (rank 0), 1 (rank 1)"),
    "degrees": ("parallelism.tensor_parallel_degree", 2, "parallelism.tensor_parallel_degree: 1 (rank 0), 2 (rank 1)"),
    "dataset": ("dataloader.dataset", "stdlib", "(rank 0), 'stdlib' (rank 1)"),
    "validation": ("validator.enable", True, "validator.enable: False (rank 0), True (rank 1)"),
    "saving": ("checkpoint.enable", True, "checkpoint.enable: False (rank 0), True (rank 1)"),
}
KINDS: dict[str, tuple[Callable[[Run], None], str]] = {
    **{name: (changed(path, value), words) for name, (path, value, words) in SETTINGS.items()},
    "model": (other_model, "model.class: 'core.testing.toy:Toy' (rank 0), 'core.testing.toy:ToyMoE' (rank 1)"),
    "tokenizer": (other_tokenizer, "tokenizer: 2,048 tokens, 895d61f4c3e44104 (rank 0), 2,048 tokens, "),
    "text": (other_text, "text (train): "),
    "version of core": (other_version("core", "0.0.9"), "version of core: 0.1.0 (rank 0), 0.0.9 (rank 1)"),
    "version of torch": (other_version("torch", "2.0"), "version of torch: "),
    "version of Python": (other_python, "(rank 0), 3.10.2 (rank 1)"),
    "code": (other_code, "code of core/step/update.py: "),
}


def told(folder: Path, kinds: list[str]) -> dict[str, str]:
    """What this rank is told of each kind of difference, one after another in one process."""
    texts = {}
    for number, kind in enumerate(kinds):
        run = toy_run(folder)
        run.dump_folder = str(folder / f"run-{number}")
        with pytest.MonkeyPatch.context() as patch:
            for name in ("core", "torch"):
                patch.setattr(sys.modules[name], "__version__", sys.modules[name].__version__)
            patch.setattr(core, "__path__", list(core.__path__))
            patch.setattr(identity, "python_version", identity.python_version)
            patch.setattr(StandardLibrary, "__init__", StandardLibrary.__init__)
            if dist.get_rank() == 1 or kind == "text":
                CHANGES[kind](run)
            try:
                run.build()
                texts[kind] = "built"
            except UserError as error:
                texts[kind] = str(error)
                assert not Path(run.dump_folder).exists()
    return texts


CHANGES = {kind: change for kind, (change, _) in KINDS.items()} | {"places of its own": own_places}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[dict[str, str]]:
    """What each of two ranks is told, by what they differ in."""
    folder = tmp_path_factory.mktemp("disagreement")
    toy_run(folder)  # the text, before two ranks write it at once
    return run_ranks(told, 2, folder, list(CHANGES))


@pytest.mark.parametrize("kind", KINDS)
def test_a_difference_is_one_error_on_every_rank_and_is_named(texts, kind):
    first, second = (each[kind] for each in texts)
    assert first == second and KINDS[kind][1] in first
    head, *lines, end = first.splitlines()
    assert head == "the ranks of this run do not agree:" and end.startswith("start all of them with the same")
    assert len(lines) == 1 or kind == "model"
    assert "(rank 0)" in lines[0] and "(rank 1)" in lines[0]


def test_places_may_differ(texts):
    assert [each["places of its own"] for each in texts] == ["built", "built"]
