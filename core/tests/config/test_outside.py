"""Recipes outside of the program's package: named by their module or their file, and what a file alone may not do."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from core.config.cli import main
from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.outside import NAMED, import_outside
from core.config.recipe import load_config
from core.config.record import to_dict, to_json

RECIPES = """
from dataclasses import dataclass, field
from pathlib import Path

from armature_beside import STEPS
from core.config.configurable import Configurable
from core.config.record import to_json

Path(__file__).with_name("it-ran").touch()


class Run(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        recipe: str = ""
        steps: int

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self) -> None:
        print(to_json(self.config))


def small() -> Run.Config:
    return Run.Config(steps=STEPS)


def large_one() -> Run.Config:
    return Run.Config(steps=1000)


def number() -> int:
    return 3


def with_arguments(steps: int) -> Run.Config:
    return Run.Config(steps=steps)
"""

CONFIGS = ModuleType("toy_recipes_here")


def here() -> Configurable.Config:
    raise UserError("not of interest")


here.__module__ = CONFIGS.__name__
CONFIGS.here = here


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a file of recipes, and a package; the working directory is another one."""
    folder = tmp_path / "files"
    (folder / "armature_package").mkdir(parents=True)
    (folder / "armature_recipes.py").write_text(RECIPES)
    (folder / "armature_beside.py").write_text("STEPS = 7\n")
    (folder / "armature_package/__init__.py").touch()
    (folder / "armature_package/recipes.py").write_text("from armature_recipes import Run, small\n")
    (folder / "armature_package/parts.py").write_text(
        "from armature_recipes import Run\n\n\nclass Other(Run):\n    pass\n"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [*sys.path])
    NAMED.clear()
    yield folder
    forget()
    NAMED.clear()


def forget() -> None:
    """Another process begins."""
    for name in [name for name in sys.modules if name.startswith("armature_")]:
        del sys.modules[name]


def refusal(*sources: str, trust: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        load_config(sources, CONFIGS, trust=trust)
    return str(caught.value)


def test_a_function_in_a_file_is_a_recipe(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = "../files/armature_recipes.py:small"
    config = load_config([source], CONFIGS)
    assert to_dict(config) == {"class": "armature_recipes:Run", "recipe": "small", "steps": 7}
    assert load_config([f"{files}/armature_recipes.py:large-one"], CONFIGS).steps == 1000
    main(CONFIGS, ["--config", source, "--steps", "8"])
    assert json.loads(capsys.readouterr().out)["steps"] == 8
    assert NAMED == {"armature_recipes": "../files/armature_recipes.py"}


def test_a_function_in_a_module_is_a_recipe(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(files)
    config = load_config(["armature_package.recipes:small"], CONFIGS)
    assert to_dict(config) == {"class": "armature_recipes:Run", "recipe": "small", "steps": 7}


def test_files_change_it_and_may_name_it(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(files)
    source = "../files/armature_recipes.py:small"
    for data in ({"steps": 3}, {"recipe": "small", "steps": 3}, {"recipe": source, "steps": 3}):
        (tmp_path / "change.json").write_text(json.dumps(data))
        assert load_config([source, "../change.json"], CONFIGS).steps == 3
    (tmp_path / "change.json").write_text(json.dumps({"recipe": "large_one"}))
    assert "changes the recipe 'large_one', not 'small'" in refusal(source, "../change.json")
    forget()
    load_config(["armature_package.recipes:small"], CONFIGS)
    (tmp_path / "whole.json").write_text(json.dumps({"class": "armature_package.parts:Other", "steps": 1}))
    assert "armature_package.parts:Other is code of the module armature_package.parts" in refusal("../whole.json")


def test_what_is_missing_is_named(files: Path) -> None:
    file = "../files/armature_recipes.py"
    for source, words in {
        f"{file}:smal": f"--config {file}:smal: {file} has no recipe smal; did you mean small?",
        f"{file}:zzz": f"{file} has no recipe zzz; it has small, large_one, number",
        f"{file}:with_arguments": f"{file} has no recipe with_arguments",
        f"{file}:STEPS": f"{file} has no recipe STEPS",
        file: f"--config {file}: name a recipe, --config {file}:NAME; it has small, large_one, number",
        f"{file}:": f"name a recipe, --config {file}:NAME",
        f"{file}:number": "armature_recipes.number returns no Config: let the name of what is no recipe start with _",
        "nowhere.py:small": f"--config nowhere.py:small: there is no file {Path('nowhere.py').resolve()}",
        "armature_nowhere.recipes:small": "armature_nowhere.recipes cannot be imported: No module named",
        "armature_beside:small": "armature_beside has no recipe small; it has no function without arguments",
        "my recipes:small": "'my recipes' is no name of a module",
        ":small": "':small' is no name of a module",
        "smal": "no recipe smal; the recipes are here",
    }.items():
        assert words in refusal(source)


def test_a_file_that_does_not_import_says_why(files: Path) -> None:
    (files / "armature_broken.py").write_text("import armature_nowhere\n")
    assert "armature_broken.py cannot be imported: No module named 'armature_nowhere'" in refusal(
        f"{files}/armature_broken.py:small"
    )
    (files / "armature_wrong.py").write_text("def small():\n    return undefined\n")
    with pytest.raises(NameError, match="undefined"):  # a fault in the recipe's code has its traceback
        load_config([f"{files}/armature_wrong.py:small"], CONFIGS)


def test_a_file_takes_no_other_modules_name(files: Path, tmp_path: Path) -> None:
    for name in ("json", "token", "tests-of-mine"):
        (files / f"{name}.py").write_text(RECIPES)
    assert f"json is the name of another module, {json.__file__}: rename {files}/json.py" in refusal(
        f"{files}/json.py:small"
    )
    assert "token is the name of another module" in refusal(f"{files}/token.py:small")
    assert "'tests-of-mine' is no name of a module" in refusal(f"{files}/tests-of-mine.py:small")
    (tmp_path / "elsewhere/armature_recipes.py").write_text(RECIPES)
    load_config([f"{files}/armature_recipes.py:small"], CONFIGS)
    assert "armature_recipes is the name of another module" in refusal("armature_recipes.py:small")


def test_a_file_alone_names_no_recipe_outside(files: Path, tmp_path: Path) -> None:
    for recipe in (f"{files}/armature_recipes.py:small", "armature_package.recipes:small", "json:small", "shutil:disk"):
        (tmp_path / "file.json").write_text(json.dumps({"recipe": recipe}))
        assert "and a file alone does not make it run: if you trust it, add --trust" in refusal("../file.json")
    assert not (files / "it-ran").exists()


def test_a_trusted_file_is_named_by_files(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes = f"{files}/armature_recipes.py"
    (tmp_path / "file.json").write_text(json.dumps({"recipe": f"{recipes}:small", "steps": 5}))
    main(CONFIGS, ["--config", "../file.json", "--trust", recipes])
    assert json.loads(capsys.readouterr().out) == {"class": "armature_recipes:Run", "recipe": "small", "steps": 5}
    assert NAMED == {"armature_recipes": recipes}


def test_what_a_run_writes_is_read_when_its_file_is_trusted(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(["../files/armature_recipes.py:small"], CONFIGS)
    (tmp_path / "config.json").write_text(to_json(config))
    forget()
    sys.path.remove(str(files))
    (files / "it-ran").unlink()
    said = refusal("../config.json")
    assert "armature_recipes:Run is code of the module armature_recipes" in said
    assert "add --trust armature_recipes, --trust FOLDER/armature_recipes.py where it is a file, or import" in said
    assert not (files / "it-ran").exists()
    main(CONFIGS, ["--config", "../config.json", "--trust", "../files/armature_recipes.py", "--print-config"])
    assert json.loads(capsys.readouterr().out) == to_dict(config)


def test_a_file_in_the_working_directory_needs_no_folder(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    assert load_config(["armature_recipes.py:small"], CONFIGS).steps == 7
    assert import_outside("armature_recipes", "--trust") is sys.modules["armature_recipes"]
