"""What bash and zsh complete: asked of the function in a real bash, and by the tab key in real shells."""

import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest

from core.config.cli import RUN_OPTIONS, main
from core.config.completion import SHELLS, program_of, script
from core.config.configurable import Configurable
from core.config.errors import UserError


@dataclass(kw_only=True, slots=True)
class Training(Configurable.Config):
    seq_len: int = 128
    seq_kind: Literal["packed", "padded"] = "packed"
    parts: list[Literal["model", "loss"]] = field(default_factory=list)
    compile: bool = False


class Dense(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        hidden_dim: int = 8


class Sparse(Dense):
    @dataclass(kw_only=True, slots=True)
    class Config(Dense.Config):
        n_experts: int = 4


class Run(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        dump_folder: str | None = None
        training: Training = field(default_factory=Training)
        model: Dense.Config = field(default_factory=Dense.Config)

    def run(self) -> None: ...


def toy_debug() -> Run.Config:
    return Run.Config()


def toy_moe() -> Run.Config:
    return Run.Config(model=Sparse.Config())


def broken() -> Run.Config:
    raise UserError("no such device")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The script for each shell, as the program prints it."""
    configs = ModuleType("toy.configs")
    for recipe in (toy_debug, toy_moe, broken):
        recipe.__module__ = "toy.configs"
        setattr(configs, recipe.__name__, recipe)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("toy.train", None))
        for shell in SHELLS:
            found[shell] = tmp_path_factory.mktemp("completion") / f"toy.{shell}"
            with found[shell].open("w") as file:
                patch.setattr(sys, "stdout", file)
                main(configs, ["--print-completion", shell])
    return found


CASES = {
    "python -m toy.train --config ": "toy_debug toy_moe broken",
    "python -m toy.train --config toy_m": "toy_moe",
    "python -m toy.train --config = toy_m": "toy_moe",
    "python3 -X dev -m toy.train --config toy_m": "toy_moe",
    "/usr/bin/python -m toy.train --dry": "--dry-run",
    "torchrun --nproc-per-node 2 --module toy.train --training.seq_l": "--training.seq_len",
    "python -m toy.train --training.seq-l": "--training.seq_len",
    "python -m toy.train --training.seq-kind ": "packed padded",
    "python -m toy.train --training.seq_kind =": "packed padded",
    "python -m toy.train --training.seq_kind packed --training.seq_len ": "",
    "python -m toy.train --training.compile ": "True False",
    "python -m toy.train --training.parts ": "model loss",
    "python -m toy.train --training.parts model l": "loss",
    "python -m toy.train --print-completion ": "bash zsh",
    "python -m toy.train --help tr": "training",
    "python -m toy.train --config toy_debug --model.": "--model.from --model.hidden_dim",
    "python -m toy.train --config toy-moe --model.": "--model.from --model.hidden_dim --model.n_experts",
    "python -m toy.train --config run.json --model.": "--model.from --model.hidden_dim --model.n_experts",
    "python -m toy.train --model.": "--model.from --model.hidden_dim --model.n_experts",
    "python -m toy.generate --": "",
    "python train.py --": "",
    "python -m toy.tr": "",
}


@pytest.fixture(scope="module")
def completed(scripts: dict[str, Path]) -> dict[str, str]:
    """What a real bash, which ends at the first thing that fails, answers to each line, whose last word is typed."""
    lines = [
        f". {shlex.quote(str(scripts['bash']))}",
        'ask() { COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)); COMPREPLY=(); _armature "$1"; echo "${COMPREPLY[*]}"; }',
        *(f"ask {shlex.join(case.split(' '))}" for case in CASES),
    ]
    strict = ["bash", "--norc", "-euo", "pipefail", "-c", "\n".join(lines)]
    done = subprocess.run(strict, capture_output=True, text=True, timeout=60)
    assert not done.stderr and done.returncode == 0
    return dict(zip(CASES, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("line", CASES)
def test_bash_completes(line: str, completed: dict[str, str]) -> None:
    assert completed[line] == CASES[line]


def test_after_a_whole_value_come_the_options(scripts: dict[str, Path]) -> None:
    program = program_of(RUN_OPTIONS, ["toy_debug", "toy_moe"], {"toy_debug": toy_debug(), "toy_moe": toy_moe()})
    line = "python -m toy.train --config toy_moe".split()
    ask = f"COMP_WORDS=({shlex.join(line)} '') COMP_CWORD={len(line)}; _armature python; echo ${{COMPREPLY[*]}}"
    done = subprocess.run(["bash", "--norc", "-c", f". {scripts['bash']}; {ask}"], capture_output=True, text=True)
    assert set(done.stdout.split()) == set(program.takes) and "--model.n_experts" in program.takes


def test_what_completed_python_before_still_does(scripts: dict[str, Path]) -> None:
    # Twice, as with the scripts of two programs.
    source = f". {scripts['bash']}; . {scripts['bash']}"
    before = "theirs() { COMPREPLY=(theirs); }; complete -F theirs python"
    ask = "COMP_WORDS=(python -m json.) COMP_CWORD=2; _armature python; echo ${COMPREPLY[*]}; complete -p python"
    done = subprocess.run(["bash", "--norc", "-c", f"{before}; {source}; {ask}"], capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first == "theirs" and second.endswith("-F _armature python")


def typed(shell: str, script: Path, keys: str, folder: Path) -> str:
    """What a real shell calls python with, when these keys are typed after its prompt; `|` parts the arguments."""
    started = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}[shell]
    setup = f". {shlex.quote(str(script))}; python() {{ local IFS='|'; echo \"<$*>\"; }}; PS1='re''ady '\n"
    environ = {"PATH": os.environ["PATH"], "TERM": "dumb", "HOME": str(folder)}
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        started, stdin=end, stdout=end, stderr=end, cwd=folder, env=environ, start_new_session=True
    )
    os.close(end)
    seen = ""

    def wait(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen:
            assert select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0], seen
            seen += os.read(terminal, 65536).decode(errors="replace")

    try:
        os.write(terminal, setup.encode())
        wait("ready")
        seen = ""
        os.write(terminal, f"{keys}\n".encode())
        wait(">")
        return seen.rpartition("<")[2].partition(">")[0]
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_tab_key(shell: str, scripts: dict[str, Path], tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "my-run.json").touch()
    keys = "python -m toy.train --config toy_m\t --model.n\t 8 --training.seq-k\t pad\t --config my\t"
    wanted = "-m|toy.train|--config|toy_moe|--model.n_experts|8|--training.seq_kind|padded|--config|my-run.json"
    assert typed(shell, scripts[shell], keys, tmp_path) == wanted


def test_refusals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program = program_of(RUN_OPTIONS, [], {})
    with pytest.raises(UserError, match="--print-completion knows bash and zsh, got fish"):
        script("fish", program)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    with pytest.raises(UserError, match="called as python -m PACKAGE.PROGRAM"):
        script("bash", program)
