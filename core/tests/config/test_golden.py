"""Golden texts: what they say, and what the command writes, removes and leaves alone."""

import sys
from pathlib import Path

import pytest

from core.config.golden import golden_text, golden_texts, main

SOURCE = '''
from dataclasses import dataclass, field
from core.config.configurable import Configurable

class Part(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        size: int = 1
        names: list[str] = field(default_factory=lambda: ["a"])

class Big(Part):
    pass

class Run(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        rate: float = 1e-5
        part: Part.Config = field(default_factory=Part.Config)
        folder: str | None = None
        note: str = "two words"

def small() -> Run.Config:
    """A small one."""
    return Run.Config()

def large() -> Run.Config:
    """A large one."""
    return Run.Config(part=Big.Config(size=9))

def _scaled(n: int) -> Run.Config:
    return Run.Config(part=Part.Config(size=n))
'''
SMALL = """\
# recipe small
class = "toygold.configs:Run"
rate = 1e-05
part.size = 1
part.names = ["a"]
folder = null
note = "two words"
"""


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package `toygold` with two recipes."""
    folder = tmp_path / "toygold"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "configs.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "toygold"]:
        del sys.modules[name]


def test_the_command_writes_what_changed_and_removes_what_is_gone(package, tmp_path, capsys):
    golden = tmp_path / "tests" / "golden"
    main(["toygold.configs", str(golden)])
    assert capsys.readouterr().out == "new small.txt\nnew large.txt\n"
    assert (golden / "small.txt").read_text() == SMALL
    large = (golden / "large.txt").read_text()
    assert 'part.class = "toygold.configs:Big"\npart.size = 9\n' in large

    main(["toygold.configs", str(golden)])
    assert capsys.readouterr().out == "nothing changed\n"

    (golden / "small.txt").write_text(SMALL.replace("part.size = 1", "part.size = 2"))
    (golden / "old.txt").write_text("# recipe old\nrate = 1\n")
    (golden / "notes.txt").write_text("mine\n")
    main(["toygold.configs", str(golden)])
    report = "removed old.txt\nchanged small.txt\n  -part.size = 2\n  +part.size = 1\n"
    assert capsys.readouterr().out == report
    assert sorted(file.name for file in golden.iterdir()) == ["large.txt", "notes.txt", "small.txt"]
    assert (golden / "small.txt").read_text() == SMALL


def test_texts_for_the_tests_of_a_package(package):
    configs = __import__("toygold.configs").configs
    assert golden_texts(configs).keys() == {"small", "large"}
    assert golden_texts(configs)["small"] == SMALL == f"# recipe small\n{golden_text(configs.small())}"


def test_a_module_without_recipes_removes_nothing(package, tmp_path, capsys):
    main(["toygold.configs", str(tmp_path)])
    with pytest.raises(SystemExit):
        main(["toygold", str(tmp_path)])
    assert "error: no recipes in toygold: name the module" in capsys.readouterr().err
    assert {file.name for file in tmp_path.glob("*.txt")} == {"large.txt", "small.txt"}


@pytest.mark.parametrize(
    ("argv", "message"), [([], "usage: "), (["no_such.configs", "x"], "no recipes in no_such.configs: No module named")]
)
def test_wrong_calls_exit_with_2(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
