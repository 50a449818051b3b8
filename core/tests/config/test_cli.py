"""The command line: recipes and files, overrides of every type, help, and what a mistake gets to hear."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from importlib.metadata import version
from types import ModuleType
from typing import Literal

import pytest

import core
from core.config import cli
from core.config.cli import main
from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.recipe import recipes
from core.config.record import to_json

Color = Enum("Color", "RED BLUE")


class Model(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        dim: int = 8
        """Width."""


class Qwen(Model):
    @dataclass(kw_only=True, slots=True)
    class Config(Model.Config):
        n_layers: int
        """Number of blocks."""
        kinds: list[Literal["full", "window"]] = field(default_factory=lambda: ["full"])
        """Attention of each block."""


class Adam(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        lr: float = 1e-3
        """Peak learning rate."""
        betas: tuple[float, float] = (0.9, 0.95)


class Muon(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        momentum: float = 0.95


@dataclass(kw_only=True, slots=True)
class Training(Configurable.Config):
    steps: int = 10
    """Optimizer updates
    of the run."""
    seq_len: int = 128
    compile: bool = False
    fused: bool = True
    maybe: bool | None = None

    def problems(self):
        if self.steps < 1:
            yield "steps", f"steps {self.steps} must be at least 1"


class Run(Configurable):
    """A run that notes that it ran.

    No more.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        training: Training = field(default_factory=Training)
        """How long."""
        model: Model.Config = field(default_factory=Model.Config)
        """What is trained."""
        optimizer: Adam.Config | Muon.Config = field(default_factory=Adam.Config)
        validation: Training | None = None
        dump_folder: str | None = None
        color: Color = Color.RED
        limit: int | None = None
        tags: list[str] = field(default_factory=list)
        switches: list[bool] = field(default_factory=list)
        table: dict[str, int] = field(default_factory=dict)
        branches: list[Model.Config] = field(default_factory=list)

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self) -> int:
        DONE.append(self.config)
        return 7


DONE: list[Run.Config] = []


def qwen_debug() -> Run.Config:
    """A small model.

    With more to say.
    """
    return Run.Config(model=Qwen.Config(n_layers=2), training=Training(steps=20), branches=[Model.Config()])


def qwen_muon() -> Run.Config:
    """Another optimizer."""
    config = qwen_debug()
    config.optimizer = Muon.Config()
    return config


def plain_1_7b():
    return Run.Config()


def broken() -> Run.Config:
    """Refuses itself."""
    raise UserError("no such device")


def scaled(n: int) -> Run.Config:
    return Run.Config()


def _hidden() -> Run.Config:
    return Run.Config()


def module_of(*functions: Callable) -> ModuleType:
    """A module that defines the functions."""
    module = ModuleType("toy_configs")
    for function in functions:
        function.__module__ = "toy_configs"
        setattr(module, function.__name__, function)
    return module


CONFIGS = module_of(qwen_debug, qwen_muon, plain_1_7b, broken, scaled, _hidden)
CONFIGS.imported = to_json


def run(*argv: str) -> Run.Config:
    DONE.clear()
    main(CONFIGS, argv)
    (config,) = DONE
    return config


@pytest.fixture
def fails(capsys):
    """Runs main, which must end with code 2, print nothing on standard output, and gives the error without its mark."""

    def check(*argv: str) -> str:
        DONE.clear()
        with pytest.raises(SystemExit) as end:
            main(CONFIGS, argv)
        out, err = capsys.readouterr()
        assert end.value.code == 2 and out == "" and not DONE
        assert err.startswith("error: ") and "Traceback" not in err
        return "\n".join(line[7:] for line in err.splitlines())

    return check


def test_recipes_are_the_public_functions_without_arguments_in_order():
    assert list(recipes(CONFIGS)) == ["qwen_debug", "qwen_muon", "plain_1_7b", "broken"]


@pytest.mark.parametrize("argv", [["--config", "qwen_debug"], ["--config=qwen_debug"], ["--config", "qwen-debug"]])
def test_a_recipe_runs_as_it_is(argv):
    assert run(*argv) == qwen_debug()


def test_argv_is_read_when_main_is_called(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--config", "plain-1_7b", "--training.steps=3"])
    DONE.clear()
    main(CONFIGS)
    assert DONE == [Run.Config(training=Training(steps=3))]


def test_options_come_in_any_order_and_spelling():
    expected = qwen_debug()
    expected.training.steps, expected.training.seq_len, expected.model.n_layers = 3, 64, 4
    expected.dump_folder = "x"
    for argv in (
        "--config qwen_debug --training.steps 3 --training.seq_len 64 --model.n_layers 4 --dump_folder x",
        "--model.n-layers=4 --training.seq-len 64 --config qwen_debug --dump-folder x --training.steps=3",
    ):
        assert run(*argv.split()) == expected


def test_fields_of_the_class_that_the_recipe_chose():
    assert run("--config", "qwen_muon", "--optimizer.momentum", "0.5").optimizer == Muon.Config(momentum=0.5)
    assert run("--config", "qwen_debug", "--branches.0.dim", "3").branches == [Model.Config(dim=3)]


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        ("--training.compile", "training.compile", True),
        ("--training.compile True", "training.compile", True),
        ("--training.compile=False", "training.compile", False),
        ("--training.compile true", "training.compile", True),
        ("--training.fused=false", "training.fused", False),
        ("--training.fused FALSE", "training.fused", False),
        ("--training.maybe true", "training.maybe", True),
        ("--switches true False TRUE", "switches", [True, False, True]),
        ("--training.no-fused", "training.fused", False),
        ("--training.no_fused", "training.fused", False),
        ("--training.maybe", "training.maybe", True),
        ("--training.no-maybe", "training.maybe", False),
        ("--training.maybe None", "training.maybe", None),
        ("--optimizer.lr 3e-4", "optimizer.lr", 3e-4),
        ("--optimizer.lr 1", "optimizer.lr", 1.0),
        ("--optimizer.lr inf", "optimizer.lr", float("inf")),
        ("--optimizer.lr -1", "optimizer.lr", -1.0),
        ("--optimizer.betas 0.8 0.9", "optimizer.betas", (0.8, 0.9)),
        ("--limit 5", "limit", 5),
        ("--limit 5 --limit None", "limit", None),
        ("--color BLUE", "color", Color.BLUE),
        ("--tags a b -c", "tags", ["a", "b", "-c"]),
        ("--tags", "tags", []),
        ("--tags=--odd", "tags", ["--odd"]),
        ("--dump_folder=a=b", "dump_folder", "a=b"),
        ("--dump_folder=", "dump_folder", ""),
        ("--table a 1 b 2", "table", {"a": 1, "b": 2}),
        ("--model.kinds full window", "model.kinds", ["full", "window"]),
        ("--training.steps 3 --training.steps 4", "training.steps", 4),
    ],
)
def test_values_of_every_type(words: str, path: str, value: object):
    found: object = run("--config", "qwen_debug", *words.split())
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_a_file_runs_again_and_the_command_line_goes_before_it(tmp_path, capsys):
    file = tmp_path / "config.json"
    main(CONFIGS, ["--config", "qwen_debug", "--training.steps", "7", "--training.seq_len", "9", "--print-config"])
    text = capsys.readouterr().out
    file.write_text(text)
    assert json.loads(text)["model"]["class"] == f"{__name__}:Qwen"
    config = run("--config", str(file), "--training.steps", "8", "--model.n_layers", "5")
    assert (config.training.steps, config.training.seq_len, config.model.n_layers) == (8, 9, 5)
    assert to_json(run(f"--config={file}")) == text


def test_print_config_does_not_run_but_validates(capsys, fails):
    DONE.clear()
    main(CONFIGS, ["--print_config", "--config", "plain_1_7b"])
    assert capsys.readouterr().out == to_json(Run.Config()) and not DONE
    assert "steps 0 must" in fails("--print-config", "--config", "plain_1_7b", "--training.steps", "0")


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["--training.steps", "3"]])
def test_without_a_recipe_they_are_listed(argv, capsys):
    if "help" in "".join(argv) or "-h" in argv:
        main(CONFIGS, argv)
        err = ""
    else:
        with pytest.raises(SystemExit) as end:
            main(CONFIGS, argv)
        assert end.value.code == 2
        err = "error: choose a recipe: --config NAME\n"
    out = capsys.readouterr()
    assert out.err == err
    assert out.out.startswith("usage: ")
    assert "  qwen_debug   A small model.\n  qwen_muon    Another optimizer.\n  plain_1_7b\n" in out.out
    assert "more to say" not in out.out and "scaled" not in out.out and "_hidden" not in out.out


@pytest.mark.parametrize("argv", [["--config", "qwen_debug", "--help"], ["-h", "--config=qwen_debug"]])
def test_help_of_a_recipe_shows_every_setting(argv, capsys):
    main(CONFIGS, argv)
    text = capsys.readouterr().out
    assert "--training.steps INT = 20, default 10\n      Optimizer updates of the run.\n" in text
    assert "--training.seq_len INT = 128\n" in text
    assert "--training.fused = True\n" in text
    assert (
        "--model.dim INT = 8\n      Width.\n" in text and "--model.n_layers INT = 2\n      Number of blocks.\n" in text
    )
    assert "model (Qwen.Config): What is trained.\n" in text
    assert "--optimizer.betas FLOAT FLOAT = 0.9 0.95" in text
    assert "--color {RED,BLUE} = RED" in text and "--tags [STR [STR ...]] = (nothing)" in text
    assert text.isascii() and "\x1b" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config qwen_debgu", "no recipe qwen_debgu; did you mean qwen_debug"),
        ("--config zzzz", "no recipe zzzz; the recipes are qwen_debug, qwen_muon, plain_1_7b, broken"),
        ("--config scaled", "no recipe scaled; the recipes are"),
        ("--config", "--config takes one value or more, got nothing"),
        ("--config a b", "no recipe a; the recipes are"),
        ("--config broken", "no such device"),
        ("--config qwen_debug --print-config x", "--print-config takes no values, got x"),
        ("--config qwen_debug --training.stpes 3", "no option --training.stpes; did you mean --training.steps?"),
        ("--config qwen_debug --trainng.no-fused", "no option --trainng.no-fused; did you mean --training.fused?"),
        ("--config qwen_debug --lr 3", "no option --lr; did you mean --optimizer.lr?"),
        ("--config qwen_debug --zzzzzzzz 3", "no option --zzzzzzzz; --help WORD searches, --help all lists them"),
        ("--config plain_1_7b --model.n_layers 3", "no option --model.n_layers; --help WORD"),
        ("--config qwen_debug --optimizer.no-lr", "no option --optimizer.no-lr; did you mean --optimizer.lr?"),
        ("--config qwen_debug --training.steps abc", "--training.steps: expected INT, got abc"),
        ("--config qwen_debug --training.steps 1e3", "--training.steps: expected INT, got 1e3"),
        ("--config qwen_debug --training.steps", "--training.steps: expected INT, got nothing"),
        ("--config qwen_debug --training.steps 3 junk", "--training.steps: expected INT, got 3 junk"),
        ("--config qwen_debug --training.compile junk", "--training.compile: expected {True,False}, got junk"),
        ("--config qwen_debug --training.no-fused 3", "--training.no-fused takes no value, got 3"),
        ("--config qwen_debug --optimizer.betas 0.9", "--optimizer.betas: expected FLOAT FLOAT, got 0.9"),
        ("--config qwen_debug --model.kinds full half", "--model.kinds: expected [{full,window} [{full,window} ...]]"),
        ("--config qwen_debug --color GREEN", "--color: expected {RED,BLUE}, got GREEN"),
        ("--config qwen_debug --table a", "--table: expected [STR INT [STR INT ...]], got a"),
        ("qwen_debug", "qwen_debug belongs to no option"),
        ("--config=qwen_debug junk", "junk belongs to no option"),
        ("--config qwen_debug --training.steps=3 junk", "junk belongs to no option"),
        ("--config qwen_debug --training.steps 0", "training.steps: steps 0 must be at least 1"),
        ("--config no_such.json", "no_such.json cannot be read: No such file"),
    ],
)
def test_a_mistake_is_named_and_ends_with_2(words: str, message: str, fails):
    assert fails(*words.split()).startswith(message)


def test_all_wrong_options_are_told_together(fails):
    text = fails("--config", "qwen_debug", "--training.steps", "x", "--training.sep_len", "3", "--color", "G")
    assert text.splitlines() == [
        "--training.steps: expected INT, got x",
        "no option --training.sep_len; did you mean --training.seq_len?",
        "--color: expected {RED,BLUE}, got G",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", " is not JSON: "),
        (b"\xff\xfe\x00", " is not UTF-8: "),
        (b"[]", " is no JSON object"),
        (b"{}", ' has no "class", which a whole configuration has, and no "recipe" that it changes: '),
        (b'{"class": "json:JSONDecoder"}', " is no configuration:\nclass: json:JSONDecoder is no Configurable"),
    ],
)
def test_a_file_that_is_no_configuration(content: bytes, message: str, tmp_path, fails):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    text = fails("--config", str(file))
    assert text.startswith(f"{file}{message}")


def test_errors_while_building_or_running(monkeypatch, fails):
    def refuse(self):
        raise UserError("too little memory:\n3 GiB")

    monkeypatch.setattr(Run, "run", refuse)
    assert fails("--config", "qwen_debug") == "too little memory:\n3 GiB"
    monkeypatch.setattr(Run, "run", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(CONFIGS, ["--config", "qwen_debug"])


def test_ctrl_c_outside_of_training_is_no_traceback(monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "run", interrupt)
    with pytest.raises(SystemExit) as end:
        main(CONFIGS, ["--config", "qwen_debug"])
    assert (end.value.code, *capsys.readouterr()) == (130, "", "interrupted\n")


def test_a_program_without_recipes(capsys):
    DONE.clear()
    cli.run(Run.Config(), ["--training.steps", "3", "--dump-folder=x"])
    assert DONE == [Run.Config(training=Training(steps=3), dump_folder="x")]
    cli.run(Run.Config(), ["-h"])
    assert ": A run that notes that it ran.\nSettings as" in capsys.readouterr().out
    for argv, message in (
        (["--config", "qwen_debug"], "no option --config"),
        (["--print-config"], "no option --print-config"),
        (["--training.stpes", "3"], "no option --training.stpes; did you mean --training.steps?"),
        (["--training.steps", "0"], "training.steps: steps 0 must be at least 1"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.run(Run.Config(), argv)
        assert end.value.code == 2 and capsys.readouterr().err.startswith(f"error: {message}")


def test_a_configuration_with_a_field_for_it_is_told_its_recipe(capsys):
    class Named(Configurable):
        @dataclass(kw_only=True, slots=True)
        class Config(Configurable.Config):
            recipe: str = ""

        def __init__(self, config) -> None:
            print(config.recipe)

        def run(self) -> None: ...

    def my_recipe():
        return Named.Config()

    main(module_of(my_recipe), ["--config", "my-recipe"])
    main(module_of(my_recipe), ["--config", "my-recipe", "--recipe", "other"])
    assert capsys.readouterr().out == "my_recipe\nother\n"


def test_a_function_that_is_no_recipe_is_a_defect():
    def number():
        return 3

    with pytest.raises(TypeError, match="toy_configs.number returns no Config"):
        main(module_of(number), ["--config", "number"])


BIG = """
import sys
from dataclasses import field, make_dataclass
from types import ModuleType
import core
from core.config import cli
from core.config.configurable import Configurable

TYPES = [int, float, str | None, list[str]]
MAKERS = [int, float, lambda: None, list]

def section(i):
    fields = [(f"a{j}", TYPES[j % 4], field(default_factory=MAKERS[j % 4])) for j in range(10)]
    config = make_dataclass("Config", fields, bases=(Configurable.Config,), kw_only=True, slots=True)
    return type(f"Part{i}", (Configurable,), {"Config": config}).Config

parts = [(f"p{i}", part, field(default_factory=part)) for i, part in enumerate(map(section, range(10)))]
Root = make_dataclass("Config", parts, bases=(Configurable.Config,), kw_only=True, slots=True)

class Run(Configurable):
    Config = Root
    def __init__(self, config): self.config = config
    def run(self): print("ran", self.config.p3.a0)

def big(): return Root()
configs = ModuleType("toy_configs")
big.__module__, configs.big = "toy_configs", big
cli.main(configs)
print("tyro" in sys.modules, "torch" in sys.modules)
"""


def big(*argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONWARNINGS": "error"}
    return subprocess.run([sys.executable, "-c", BIG, *argv], capture_output=True, text=True, env=env, timeout=60)


def test_tyro_comes_late_and_torch_not_at_all():
    *_, tyro, torch = big("--help").stdout.split()
    assert (tyro, torch) == ("False", "False")
    _, value, tyro, torch = big("--config", "big", "--p3.a0", "5", "--p1.a3", "a", "b").stdout.split()
    assert (value, tyro, torch) == ("5", "True", "False")


def test_versions_are_told_without_the_recipes_and_torch():
    program = "import sys; from core.config.cli import main; main('core.absent', ['--version']); print('torch' in {})"
    words = [sys.executable, "-c", program.format("sys.modules")]
    told = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout.split()
    assert told[:4] == ["core", core.__version__, "torch", version("torch")] and told[-1] == "False"


def test_the_module_of_the_recipes_may_be_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "toy_configs", CONFIGS)
    DONE.clear()
    main("toy_configs", ["--config", "qwen_debug"])
    assert DONE == [qwen_debug()]


def test_the_exit_code_of_the_process():
    wrong = big("--config", "bgi")
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", "error: no recipe bgi; did you mean big?\n")


def test_a_reader_may_leave_early():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run([sys.executable, "-c", BIG, "--help"], stdout=pipe, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
