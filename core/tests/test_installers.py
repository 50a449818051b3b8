"""Models installed for real, by old and new pip and by uv, from a checkout and from git: what lies in the environment.

torch is left out: pip sees the one of the environment that runs the tests, uv is told that none is needed.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("core", "models/qwen3", "models/llama3")
INSTALLERS = ("pip==23.2.1", "pip", "uv")
pytestmark = pytest.mark.installs


def call(*words: str | Path) -> str:
    """What a program prints; one that fails is an error with what it said."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository with the packages of this checkout as they are."""
    folder = tmp_path_factory.mktemp("origin") / "armature"
    dust = shutil.ignore_patterns("__pycache__", "tests", ".*")
    for name in ("core", "models"):
        shutil.copytree(ROOT / name, folder / name, ignore=dust)
    git = ("git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@example.com")
    call(*git, "init", "-q")
    call(*git, "add", ".")
    call(*git, "commit", "-q", "-m", "all")
    return folder


class Environment:
    """A virtual environment, and one way to install into it."""

    def __init__(self, folder: Path, installer: str) -> None:
        call(sys.executable, "-m", "venv", folder)
        self.python = folder / "bin/python"
        if installer == "uv":
            (folder / "overrides.txt").write_text("torch; sys_platform == 'never'\n")
            self.pip = (shutil.which("uv") or "uv", "pip")
            self.where: tuple[str | Path, ...] = ("--python", self.python)
            self.how = (*self.where, "--override", folder / "overrides.txt")
        else:
            call(self.python, "-m", "pip", "install", "--quiet", "--upgrade", installer)
            site = call(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
            Path(site, "third_party.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
            self.pip, self.where, self.how = (self.python, "-m", "pip"), (), ()

    def install(self, *what: str | Path) -> None:
        """Install, as a user would."""
        call(*self.pip, "install", *self.how, *what)

    def frozen(self) -> dict[str, str]:
        """What `freeze` says of each package of ours, by its folder, without commits."""
        lines = re.sub("@[0-9a-f]{40}", "@COMMIT", self.freeze()).splitlines()
        return {name: line for line in lines for name in OURS if re.search(rf"[/=]{name}$", line)}

    def freeze(self) -> str:
        """What is installed, as text that installs it again."""
        return call(*self.pip, "freeze", *self.where)

    def run(self, program: str) -> str:
        """What a line of Python prints there."""
        return call(self.python, "-P", "-c", program).strip()


@pytest.fixture(params=INSTALLERS)
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment", request.param)


def test_from_a_checkout(environment: Environment, repository: Path) -> None:
    environment.install(repository / "models/qwen3", repository / "models/llama3")
    folders = {name: (repository / name).as_uri() for name in OURS}
    assert {name: line.rpartition(" ")[2] for name, line in environment.frozen().items()} == folders
    assert environment.run("import core, qwen3, llama3; print(core.__version__ == qwen3.__version__)") == "True"


def test_a_live_core_stays(environment: Environment, repository: Path) -> None:
    environment.install("-e", repository / "core")
    environment.install("-e", repository / "models/qwen3")
    for name, folder in (("core", "core"), ("qwen3", "models/qwen3")):
        found = environment.run(f"import {name}; print({name}.__file__)")
        assert Path(found).samefile(repository / folder / f"src/{name}/__init__.py")


def test_from_git(environment: Environment, repository: Path) -> None:
    # A name in front, an extra, and two models of one commit; what freeze says installs the same again.
    address = f"git+file://localhost{repository}"
    second = f"{address}#subdirectory=models/llama3"
    environment.install(f"armature-qwen3[tensorboard] @ {address}#subdirectory=models/qwen3", second)
    frozen = environment.frozen()
    assert set(frozen) == set(OURS)
    for name, line in frozen.items():
        assert re.fullmatch(rf"armature-\w+ @ git\+file://(localhost)?{repository}@COMMIT#subdirectory={name}", line)
    environment.install(*(line for line in environment.freeze().splitlines() if line.startswith("armature-")))
    assert environment.frozen() == frozen
    assert environment.run("import core, qwen3, llama3; print(core.__version__ == qwen3.__version__)") == "True"
