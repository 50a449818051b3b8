"""What --config names: whole configurations, parts, what differs from a recipe; and whose code a file may run."""

import gc
import json
import sys
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from core.config.cli import main
from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.recipe import load_config, recipe_module
from core.config.record import completed, differences, from_dict, to_dict, to_json


class Net(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        dim: int
        depth: int = 2


class Deep(Net):
    @dataclass(kw_only=True, slots=True)
    class Config(Net.Config):
        heads: int = 4


class Adam(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        lr: float = 1e-3
        betas: tuple[float, float] = (0.9, 0.95)


class Muon(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        momentum: float = 0.95


@dataclass(kw_only=True, slots=True)
class Training(Configurable.Config):
    steps: int = 10
    fused: bool = True


class Run(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        recipe: str = ""
        net: Net.Config
        training: Training = field(default_factory=Training)
        optimizer: Adam.Config | Muon.Config = field(default_factory=Adam.Config)
        table: dict[str, int] = field(default_factory=dict)
        heads: list[Net.Config] = field(default_factory=list)

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self) -> None:
        print(to_json(self.config))


def small() -> Run.Config:
    return Run.Config(net=Net.Config(dim=8), training=Training(steps=20), table={"a": 1})


def large() -> Run.Config:
    return Run.Config(net=Deep.Config(dim=1024, depth=32), optimizer=Muon.Config())


def refused() -> Run.Config:
    raise UserError("not on this machine")


CONFIGS = ModuleType("toy_recipes_of_files")
for function in (small, large, refused):
    function.__module__ = CONFIGS.__name__
    setattr(CONFIGS, function.__name__, function)


@pytest.fixture
def write(tmp_path: Path):
    """Writes data as a file and gives its path."""

    def write(data: object, name: str = "config.json") -> str:
        (tmp_path / name).write_text(json.dumps(data))
        return str(tmp_path / name)

    return write


def loaded(*sources: str) -> Any:
    return load_config(sources, CONFIGS)


def refusal(*sources: str) -> str:
    with pytest.raises(UserError) as caught:
        loaded(*sources)
    return str(caught.value)


def test_a_file_changes_a_recipe(write):
    changes = {
        "training": {"steps": 50},
        "optimizer": {"lr": 1},
        "table": {"b": 2},
        "net": {"depth": 3},
        "heads": [{"dim": 1}],
    }
    expected = small()
    expected.recipe = "small"
    expected.training.steps, expected.net.depth, expected.table = 50, 3, {"b": 2}
    expected.optimizer = Adam.Config(lr=1.0)
    expected.heads = [Net.Config(dim=1)]
    assert loaded(write({"recipe": "small", **changes})) == expected
    assert loaded("small", write(changes)) == expected
    assert loaded("small", write({"recipe": "small", **changes})) == expected
    assert loaded(write({"recipe": "small"}, "a.json"), write(changes, "b.json")) == expected
    assert loaded("small", write({"training": {"steps": 9}}, "a.json"), write(changes, "b.json")) == expected
    whole = {"class": f"{__name__}:Run", **to_dict(loaded("small"))}
    assert loaded(write(whole, "a.json"), write(changes, "b.json")) == expected


def test_another_class_begins_with_its_own_defaults(write):
    net = {"class": f"{__name__}:Net", "dim": 5}
    assert loaded("large", write({"net": net})).net == Net.Config(dim=5, depth=2)
    assert loaded("large", write({"net": {**net, "class": f"{__name__}:Deep"}})).net == Deep.Config(dim=5, depth=32)
    assert loaded("large", write({"optimizer": {"class": f"{__name__}:Adam", "lr": 3}})).optimizer == Adam.Config(lr=3)
    assert loaded("large", write({"optimizer": {"momentum": 0.5}})).optimizer == Muon.Config(momentum=0.5)


def test_the_command_line_goes_before_the_files(write, capsys):
    file = write({"training": {"steps": 50, "fused": False}})
    main(CONFIGS, ["--config", "small", file, "--training.steps", "7"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["training"] == {"steps": 7, "fused": False} and shown["recipe"] == "small"


def test_what_does_not_fit_a_recipe_is_told_at_once(write):
    file = write(
        {
            "recipe": "small",
            "training": {"stpes": 1, "fused": "yes"},
            "nett": 1,
            "net": {"class": f"{__name__}:Deep"},
            "optimizer": [],
        }
    )
    assert refusal(file).splitlines() == [
        f"{file} does not fit:",
        "training.stpes: Training has no field stpes; did you mean steps?",
        "training.fused: expected bool, got 'yes'",
        "nett: Run.Config has no field nett; did you mean net?",
        "net.dim: missing; expected int",
        "optimizer: expected Adam.Config or Muon.Config, got []",
    ]


def test_a_file_is_told_from_a_whole_configuration(write):
    whole = write(to_dict(small()))
    assert loaded(whole) == small()
    assert "is a whole configuration: put it in front" in refusal("small", whole)
    assert "no recipe smal; did you mean small" in refusal(write({"recipe": "smal"}))
    assert "recipe: expected the name of one, got 3" in refusal(write({"recipe": 3}))
    assert 'no "class"' in refusal(write({"training": {"steps": 3}}))
    assert "changes the recipe 'large', not 'small'" in refusal("small", write({"recipe": "large"}))
    assert "one recipe, in front, and .json files behind it, got large" in refusal("small", "large")
    assert "no recipe here has a model that Hugging Face has: qwen3" in refusal(write({"model_type": "qwen3"}))
    nowhere = write({"class": f"{__name__}:Run", "net": {"dim": 1}, "training": {"recipe": "small"}})
    assert "Training has no field recipe" in refusal(nowhere)


def test_a_part_alone_stands_in_the_recipe_that_is_most_like_it(write, capsys):
    file = write(to_dict(Deep.Config(dim=1024, depth=30)))
    config = load_config([file], CONFIGS, of_part="; see {folder}")
    assert config.net == Deep.Config(dim=1024, depth=30) and config.optimizer == Muon.Config()
    assert config.recipe == "large"
    said = capsys.readouterr().err
    assert f"{file} describes the net alone: all else is as in recipe large" in said
    assert f"--config NAME {file} takes another's; see {Path(file).parent}\n" in said
    assert loaded("small", file).net == config.net and loaded("small", file).training.steps == 20
    assert capsys.readouterr().err == ""


def test_a_part_that_has_no_place(write):
    class Stray(Configurable):
        pass

    Stray.__qualname__ = "Stray"
    sys.modules[__name__].Stray = Stray
    file = write({"class": f"{__name__}:Stray"})
    assert "describes a" in refusal(file) and "no recipe has a place for it" in refusal(file)
    assert "which may stand nowhere in a run" in refusal("small", file)


def test_an_older_file_is_read(write, capsys):
    data = to_dict(small())
    del data["training"]["fused"], data["optimizer"], data["net"]["depth"]
    data["heads"] = [{"dim": 3}]
    file = write(data)
    config = loaded(file)
    assert config == Run.Config(
        net=Net.Config(dim=8), training=Training(steps=20), table={"a": 1}, heads=[Net.Config(dim=3)]
    )
    said = f"{file}: not stated, so at the default: net.depth 2, training.fused True, optimizer, heads.0.depth 2\n"
    assert capsys.readouterr().err == said
    assert loaded(write(to_dict(config))) == config  # what is written is complete again
    assert capsys.readouterr().err == ""
    del data["net"]["dim"]
    assert refusal(write(data)) == f"{file} is no configuration:\nnet.dim: missing; expected int"
    data = {**to_dict(small()), "optimiser": {}}
    assert "has no field optimiser; did you mean optimizer?" in refusal(write(data))


def test_of_several_ranks_one_says_what_an_older_file_lacks(write, capsys, monkeypatch):
    file = write({"class": f"{__name__}:Run", "net": {"dim": 1}})
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        loaded(file)
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_data_of_an_older_version_is_completed():
    config = Run.Config(net=Deep.Config(dim=8), heads=[Net.Config(dim=3)], table={"a": 1})
    whole = to_dict(config)
    older = deepcopy(whole)
    del older["training"], older["net"]["heads"], older["heads"][0]["depth"], older["optimizer"]["lr"]
    assert completed(older, config) == whole
    del older["net"]["dim"]  # has no default
    older["gone"] = 3
    found = differences(whole, completed(older, config))
    assert sorted(found, key=lambda each: each[0]) == [("gone", 3, ...), ("net.dim", ..., 8)]
    config.training.steps = 11
    assert ("net.class", ..., f"{__name__}:Deep") in differences(to_dict(config), completed(to_dict(small()), config))
    assert ("training.steps", 10, 11) in differences(to_dict(config), completed({}, config))
    assert completed({"net": None, "heads": 3}, config)["net"] is None


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch) -> str:
    """A module in the working directory that leaves a mark when it runs."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "armature_stranger.py").write_text(
        "from pathlib import Path\n"
        "from core.config.configurable import Configurable\n"
        "Path(__file__).with_name('it-ran').touch()\n"
        f"from {__name__} import Net\n"
        "class Odd(Net):\n    pass\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "armature_stranger", raising=False)
    return "armature_stranger"


def test_a_file_alone_runs_nobodys_code(stranger: str, write):
    data = to_dict(small())
    data["net"] = {"class": f"{stranger}:Odd", "dim": 1}
    expected = f"{stranger}:Odd is code of the module {stranger}, and a file alone does not make it run: "
    for sources in ([write(data)], ["small", write({"net": data["net"]})], [write(data["net"])]):
        assert expected in refusal(*sources) and f"--trust {stranger}" in refusal(*sources)
    with pytest.raises(UserError, match="does not make it run"):
        from_dict(data)
    assert stranger not in sys.modules and not Path("it-ran").exists()
    assert load_config([write(data)], CONFIGS, trust=[stranger]).net.dim == 1
    assert Path("it-ran").exists()


def test_trust_is_an_option(stranger: str, write, capsys):
    data = to_dict(small())
    data["net"] = {"class": f"{stranger}:Odd", "dim": 1}
    with pytest.raises(SystemExit):
        main(CONFIGS, ["--config", write(data), "--trust", "json"])
    assert f"--trust {stranger}" in capsys.readouterr().err and not Path("it-ran").exists()
    main(CONFIGS, ["--config", write(data), "--trust", "json", "--trust", stranger])
    assert f'"class": "{stranger}:Odd"' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(CONFIGS, ["--config", "small", "--trust", "armature_nowhere"])
    assert "error: --trust: armature_nowhere cannot be imported: No module named" in capsys.readouterr().err


def test_finding_a_class_asks_no_module_for_what_it_makes_on_demand(write, monkeypatch):
    lazy = ModuleType("armature_lazy")
    lazy.__getattr__ = lambda name: pytest.fail(f"{name} was made")
    monkeypatch.setitem(sys.modules, "armature_lazy", lazy)
    assert "armature_lazy:Odd is no Configurable" in refusal(write({"class": "armature_lazy:Odd"}))


@pytest.mark.parametrize("ending", ["", "raise RuntimeError('broken')"])
def test_what_recipes_import_is_no_garbage(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cycle collector rests during the import, works after it, and leaves what came with it alone."""
    lines = ["import gc, sys", "sys.armature_collects = gc.isenabled()", "CYCLE = []", "CYCLE.append(CYCLE)", ending]
    (tmp_path / "armature_frozen.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "armature_collects", True, raising=False)
    with pytest.raises(RuntimeError, match="broken") if ending else nullcontext():
        module = recipe_module("armature_frozen")
        assert not any(each is module.CYCLE for each in gc.get_objects()), "it would be looked through"
        gc.unfreeze()
        del sys.modules["armature_frozen"]
    assert gc.isenabled() and not sys.armature_collects  # pyrefly: ignore[missing-attribute] - set above
