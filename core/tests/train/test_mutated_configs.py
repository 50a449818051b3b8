"""Configurations of runs that went wrong, or that somebody wrote who meant ill: each is a run, or one error for users.

Whatever a file says is read, validated and, where it makes sense, its model is made without memory and what a run
checks is checked. Nothing else may be raised, and what was read is written and read again as the same.
"""

import json
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
import torch

from core.config.cli import override, split_flags
from core.config.errors import UserError
from core.config.fields import alternatives, walk
from core.config.options import options
from core.config.recipe import load_config
from core.config.record import from_dict, located, to_dict, to_json
from core.runtime.launcher import World
from core.runtime.meta import meta_model
from core.step.checks import check_model, check_run
from core.step.settings import Training
from core.testing.mutations import NUMBERS, TEXTS, mutated_json
from core.testing.toy import Toy, ToyMoE
from core.train.memory import check_memory
from core.train.trainer import Trainer

CPU = torch.device("cpu")
N_QUICK, N_LONG = 100, 2000


def toy() -> Trainer.Config:
    return Trainer.Config(model=Toy.Config(), training=Training(seq_len=16, local_batch_size=2))


def toy_moe() -> Trainer.Config:
    return Trainer.Config(model=ToyMoE.Config(), training=Training(seq_len=16, local_batch_size=2))


CONFIGS = ModuleType("toy_recipes_that_go_wrong")
for recipe in (toy, toy_moe):
    recipe.__module__ = CONFIGS.__name__
    setattr(CONFIGS, recipe.__name__, recipe)

CHANGES = {
    "recipe": "toy",
    "training": {"steps": 5, "device": "cpu"},
    "model": {"n_layers": 1, "attention": {"n_heads": 2, "n_kv_heads": 1}, "rope": {"scaling": "yarn"}},
    "optimizer": {"no_decay": ["*norm.weight"], "lr": 1},
    "parallelism": {"pipeline_parallel_split": []},
    "checkpoint": {"enable": True, "keep_steps": [1, 2], "exclude_from_loading": ["random"]},
}
FILES = {
    "whole": to_json(toy()),
    "whole, with experts": to_json(toy_moe()),
    "a model": to_json(ToyMoE.Config()),
    "changes": json.dumps(CHANGES),
}


def examine(config: Trainer.Config) -> None:
    """What a run does with its configuration before anything is allocated, and what it writes."""
    assert from_dict(to_dict(config)) == config or "nan" in repr(config)
    check_run(config, 1)
    model = meta_model(config.model)
    check_model(model, config, CPU)
    check_memory(model, config, CPU, World())
    to_json(located(config))


def refused(attempt: str, error: UserError) -> bool:
    """That a user can read what is said."""
    text = str(error)
    assert text.isprintable() or "\n" in text, attempt
    assert 0 < len(text.encode()) < 20_000, attempt
    return True


def read_mutated(name: str, folder: Path, n: int, seed: int) -> str:
    """Read that many changes of a file, alone and behind a recipe."""
    draw, file, n_refused = Random(f"{name} {seed}"), folder / "config.json", 0
    for number in range(n):
        data = mutated_json(FILES[name].encode(), draw)
        file.write_bytes(data)
        behind = [] if name.startswith("whole") or draw.random() < 0.5 else [draw.choice(["toy", "toy_moe"])]
        sources = [*behind, str(file)]
        try:
            config = load_config(sources, CONFIGS)
            assert isinstance(config, Trainer.Config)
            examine(config)
        except UserError as error:
            n_refused += refused(f"{data!r}", error)
        except Exception as error:
            error.add_note(f"change {number} of {name}, {sources}: {data!r}")
            raise
    return f"{n} changes of {name}: {n_refused} refused, the others are runs"


@pytest.mark.parametrize("name", FILES)
def test_a_configuration_that_went_wrong_is_a_run_or_refused(name: str, tmp_path: Path) -> None:
    print(read_mutated(name, tmp_path, N_QUICK, 0))


@pytest.mark.faults
@pytest.mark.parametrize("name", FILES)
def test_many_configurations_that_went_wrong_are_runs_or_refused(name: str, tmp_path: Path) -> None:
    print(read_mutated(name, tmp_path, N_LONG, 1))


WORDS = [text for text in TEXTS if "\0" not in text] + ["9" * 5000, "true", "None", "a b", "--", "1_0"]


def set_options(n: int, seed: int) -> str:
    """Command lines of one to three options with words of any kind."""
    draw, n_refused = Random(seed), 0
    known = [option for path, node in walk(toy_moe()) for option in options(node, path)]
    for _ in range(n):
        config = toy_moe()
        argv = []
        for _ in range(draw.randrange(1, 4)):
            option = draw.choice(known)
            numeric = {int, float} & set(alternatives(option.annotation)) and draw.random() < 0.9
            words = [str(draw.choice(NUMBERS))] if numeric else draw.choices(WORDS, k=draw.choice([0, 1, 1, 2]))
            argv += [f"--{option.path}", *words]
        try:
            override(config, split_flags(argv))
            examine(config)
        except UserError as error:
            n_refused += refused(str(argv), error)
        except Exception as error:
            error.add_note(f"{argv}")
            raise
    return f"{n} command lines: {n_refused} refused"


def test_command_lines_of_any_kind_are_runs_or_refused() -> None:
    print(set_options(2 * N_QUICK, 0))


@pytest.mark.faults
def test_many_command_lines_of_any_kind_are_runs_or_refused() -> None:
    print(set_options(2 * N_LONG, 1))
