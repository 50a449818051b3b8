"""The packages as pip sees them: what a model asks for in and outside a checkout, and what a wheel holds."""

import email
import importlib.util
import json
import re
import shutil
import subprocess
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import core

ROOT = Path(__file__).parents[2]
MODELS = sorted(path.parent for path in ROOT.glob("models/*/pyproject.toml"))
EXPERIMENTS = sorted(path.parent for path in ROOT.glob("experiments/*/pyproject.toml"))
RANGE, QWEN3 = "armature-core>=0.1,<0.2", "armature-qwen3>=0.1,<0.2"
DEPENDENCIES = {
    "": {"jinja2", "numpy", "safetensors", "sentencepiece", "torch", "tyro"},
    "data": {"pyarrow"},
    "hf": {"datasets", "huggingface-hub", "tokenizers"},
    "tensorboard": {"tensorboard"},
    "wandb": {"wandb"},
}

each_model = pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
each_trained = pytest.mark.parametrize("folder", [*MODELS, *EXPERIMENTS], ids=lambda folder: folder.name)
each_package = pytest.mark.parametrize("folder", [ROOT / "core", *MODELS, *EXPERIMENTS], ids=lambda folder: folder.name)


def read_toml(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def build_wheel(folder: Path, into: Path) -> tuple[set[str], email.message.Message]:
    """The names of a wheel's files, without those of its .dist-info, and its metadata."""
    path = next(WheelBuilder(str(folder)).build(directory=str(into), versions=["standard"]))
    with zipfile.ZipFile(path) as wheel:
        metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
        return files, email.message_from_bytes(wheel.read(metadata))


@each_trained
def test_it_accepts_what_is_beside_it(folder: Path) -> None:
    # Inside a checkout pip takes our packages by their places and never compares versions: nothing else would notice.
    needs = {need.name: need for need in map(Requirement, read_toml(folder)["project"]["dependencies"])}
    ours = [need for name, need in needs.items() if name.startswith("armature-")]
    assert "armature-core" in needs and all(core.__version__ in need.specifier for need in ours)


@each_trained
def test_the_name_is_that_of_the_folder(folder: Path) -> None:
    """As an index writes it (PEP 503), so that pip, uv and a page that lists packages say the same."""
    name = read_toml(folder)["project"]["name"]
    prefix = "armature-x-" if folder in EXPERIMENTS else "armature-"
    assert name == prefix + folder.name.replace("_", "-") == canonicalize_name(name)


@each_trained
def test_versions_go_in_step(folder: Path) -> None:
    text = (folder / "src" / folder.name / "__init__.py").read_text(encoding="utf-8")
    assert re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1] == core.__version__


@each_trained
def test_it_passes_every_extra_on(folder: Path) -> None:
    extras = read_toml(ROOT / "core")["project"]["optional-dependencies"]
    assert read_toml(folder)["project"]["optional-dependencies"] == {
        name: [f"armature-core[{name}]"] for name in extras
    }


def test_another_dependency_is_a_decision() -> None:
    project = read_toml(ROOT / "core")["project"]
    asked = {"": project["dependencies"], **project["optional-dependencies"]}
    decisions = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/decisions").glob("*.md"))
    for extra, requirements in asked.items():
        others = {Requirement(need).name for need in requirements} - DEPENDENCIES.get(extra, set())
        assert not [name for name in others if f"`{name}`" not in decisions]


def test_every_release_of_torch_in_the_range_has_a_session() -> None:
    (need,) = (
        need for need in read_toml(ROOT / "core")["project"]["dependencies"] if Requirement(need).name == "torch"
    )
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    minors = {*re.findall(r'"torch==(\d+\.\d+)\.\d+"', noxfile)}
    (others,) = re.findall(r'nox.parametrize\("release", .+ in \((.+)\)\]\)', noxfile)
    minors |= set(re.findall(r"[\d.]+", others))
    assert minors == {f"2.{n}" for n in range(40) if Requirement(need).specifier.contains(f"2.{n}.0")}
    decision = (ROOT / "docs/decisions/0002-torch-range.md").read_text(encoding="utf-8")
    assert decision.startswith(f"# 0002: {need}\n")
    for minor in minors:
        assert f"| {minor} |" in decision


@each_package
def test_wheel_holds_the_source_and_names_no_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_BUILD_TRACKER", raising=False)
    files, metadata = build_wheel(folder, tmp_path)
    wanted = {path.relative_to(folder / "src").as_posix() for path in (folder / "src").rglob("*") if path.is_file()}
    assert files == {name for name in wanted if "__pycache__" not in name}
    assert f"{folder.name}/py.typed" in files
    assert not [need for need in metadata.get_all("Requires-Dist") if "@" in need]
    assert str(ROOT) not in str(metadata)


def test_a_model_needs_core_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_BUILD_TRACKER", raising=False)
    for folder in MODELS:
        needs = build_wheel(folder, tmp_path)[1].get_all("Requires-Dist")
        assert [need for need in map(Requirement, needs) if not need.marker] == [Requirement(RANGE)]


def test_the_tokenizer_ships_even_if_git_ignores_it(tmp_path: Path) -> None:
    files = {
        ".git/HEAD": "",
        ".gitignore": "*.model\n",
        "core/pyproject.toml": (ROOT / "core/pyproject.toml").read_text(encoding="utf-8"),
        "core/README.md": "",
        "core/src/core/__init__.py": '__version__ = "0.1.0"\n',
        "core/src/core/data/default.model": "pieces",
        "core/src/core/nn/other.model": "a stray file",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert build_wheel(tmp_path / "core", tmp_path)[0] == {"core/__init__.py", "core/data/default.model"}


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    """core/hatch_model.py, which is no part of any package."""
    spec = importlib.util.spec_from_file_location("hatch_model", ROOT / "core/hatch_model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with core and one model, built by pip into an empty environment."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"purelib": str(tmp_path / "site")}[name])
    monkeypatch.setenv("PIP_BUILD_TRACKER", str(tmp_path / "pip-build-tracker-1"))
    (tmp_path / "site").mkdir()
    return copy_of_sources(tmp_path / "checkout")


def copy_of_sources(folder: Path) -> Path:
    """A folder like the checkout, of files that have nothing in them."""
    for name in ("core/pyproject.toml", "models/qwen3/pyproject.toml", "experiments/z_loss/pyproject.toml"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    return folder


def requirement(hook: ModuleType, checkout: Path) -> str:
    """What the model of a checkout asks for."""
    metadata = {"dependencies": ["numpy", RANGE]}
    hook.CoreRequirement(str(checkout / "models/qwen3"), {}).update(metadata)
    first, need = metadata["dependencies"]
    assert first == "numpy"
    return need


def install_core(checkout: Path, source: Path, editable: bool) -> None:
    """Leave the traces of `pip install [-e] source` in the environment."""
    info = checkout.parent / "site/armature_core-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: armature-core\nVersion: 0.1.0\n")
    (info / "direct_url.json").write_text(json.dumps({"url": source.as_uri(), "dir_info": {"editable": editable}}))


def clone_of_pip(checkout: Path, url: str) -> tuple[Path, str]:
    """A clone as pip makes one to install from git, and its commit."""
    clone = checkout.parent / "pip-req-build-1"
    git("init", "-q", str(checkout))
    git("-C", str(checkout), "add", ".")
    git("-C", str(checkout), "commit", "-q", "-m", "all")
    git("clone", "-q", str(checkout), str(clone))
    git("-C", str(clone), "remote", "set-url", "origin", url)
    return clone, git("-C", str(clone), "rev-parse", "HEAD")


def git(*words: str) -> str:
    """What git says."""
    name = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    return subprocess.run(["git", *name, *words], check=True, capture_output=True, text=True).stdout.strip()


def test_pip_takes_core_from_the_checkout(hook: ModuleType, checkout: Path) -> None:
    assert requirement(hook, checkout) == f"armature-core @ {(checkout / 'core').as_uri()}"


def test_other_builders_get_the_range(hook: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_BUILD_TRACKER")
    assert requirement(hook, checkout) == RANGE


def test_outside_a_checkout_pip_gets_the_range(hook: ModuleType, checkout: Path) -> None:
    (checkout / "core/pyproject.toml").unlink()
    assert requirement(hook, checkout) == RANGE


def test_an_editable_core_of_this_checkout_stays(hook: ModuleType, checkout: Path) -> None:
    install_core(checkout, checkout / "core", editable=True)
    assert requirement(hook, checkout) == RANGE


@pytest.mark.parametrize(("source", "editable"), [("core", False), ("elsewhere/core", True)])
def test_any_other_core_is_replaced(hook: ModuleType, checkout: Path, source: str, editable: bool) -> None:
    install_core(checkout, checkout / source, editable)
    assert requirement(hook, checkout).startswith("armature-core @ file:")


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="without git nobody installs from git")


@needs_git
@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("https://example.com/armature.git", "git+https://example.com/armature.git"),
        ("ssh://git@example.com/armature", "git+ssh://git@example.com/armature"),
        ("file:///shared/armature", "git+file://localhost/shared/armature"),  # pip 23 takes no address without a host
    ],
)
def test_from_git_core_is_the_same_commit(hook: ModuleType, checkout: Path, url: str, asked: str) -> None:
    clone, commit = clone_of_pip(checkout, url)
    need = requirement(hook, clone)
    assert need == f"armature-core @ {asked}@{commit}#subdirectory=core"
    assert Requirement(need).url
    metadata = {"dependencies": [QWEN3]}
    hook.CoreRequirement(str(clone / "experiments/z_loss"), {}).update(metadata)
    assert metadata["dependencies"] == [f"armature-qwen3 @ {asked}@{commit}#subdirectory=models/qwen3"]


@needs_git
@pytest.mark.parametrize("url", ["https://me:secret@example.com/a", "https://token@example.com/a"])
def test_no_password_goes_into_metadata(hook: ModuleType, checkout: Path, url: str) -> None:
    clone, _ = clone_of_pip(checkout, url)
    assert requirement(hook, clone) == f"armature-core @ {(clone / 'core').as_uri()}"


@needs_git
def test_a_clone_of_the_users_is_taken_as_it_is(
    hook: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone, _ = clone_of_pip(checkout, "https://example.com/armature.git")
    kept = clone.rename(clone.with_name("my-clone"))
    assert requirement(hook, kept) == f"armature-core @ {(kept / 'core').as_uri()}"
    monkeypatch.setenv("PIP_BUILD_TRACKER", str(checkout.parent / "elsewhere/pip-build-tracker-1"))
    kept = kept.rename(clone)
    assert requirement(hook, kept) == f"armature-core @ {(kept / 'core').as_uri()}"


def test_an_unpacked_archive_has_no_commit(hook: ModuleType, checkout: Path) -> None:
    folder = copy_of_sources(checkout.parent / "pip-req-build-2")
    assert requirement(hook, folder) == f"armature-core @ {(folder / 'core').as_uri()}"


def test_an_experiment_takes_its_model_from_the_checkout(hook: ModuleType, checkout: Path) -> None:
    def needs() -> list[str]:
        metadata = {"dependencies": ["armature-other>=1", RANGE, QWEN3]}
        hook.CoreRequirement(str(checkout / "experiments/z_loss"), {}).update(metadata)
        return metadata["dependencies"]

    core_url, model_url = ((checkout / folder).as_uri() for folder in ("core", "models/qwen3"))
    assert needs() == ["armature-other>=1", f"armature-core @ {core_url}", f"armature-qwen3 @ {model_url}"]
    install_core(checkout, checkout / "core", editable=True)
    assert needs() == ["armature-other>=1", RANGE, f"armature-qwen3 @ {model_url}"]


@each_trained
def test_the_wheel_that_pip_builds_asks_for_the_core_beside_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_BUILD_TRACKER", str(tmp_path / "pip-build-tracker-1"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    needs = build_wheel(folder, tmp_path)[1].get_all("Requires-Dist")
    asked = [need for need in needs if "extra ==" not in need and need.startswith("armature-")]
    assert asked[0] == f"armature-core @ {(ROOT / 'core').as_uri()}"
    assert all(f" @ {(ROOT / 'models').as_uri()}/" in need for need in asked[1:])


@each_trained
def test_uv_reads_where_core_is_without_building(folder: Path) -> None:
    # uv asks a backend for what is dynamic, and for a model from git it then forgets the sources.
    toml = read_toml(folder)
    assert "dependencies" not in toml["project"]["dynamic"]
    sources = toml["tool"]["uv"]["sources"]
    names = {Requirement(need).name for need in toml["project"]["dependencies"]}
    assert sources.keys() == {name for name in names if name.startswith("armature-")}
    for name, source in sources.items():
        named = read_toml(folder / source["path"])["project"]["name"]
        assert named == name and source["editable"] is True
