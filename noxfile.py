"""The chores: plain `nox` runs what CI runs, `nox -t qwen3` one package's part of it, `nox --list` names them all.

A package is a folder: core, and every models/*/ and experiments/*/ with a pyproject.toml. Torch is most of a gigabyte,
so the session `shared` installs third-party packages once, into its own environment; the small environments of the
other sessions, which hold nothing but our packages, see it through a .pth file. A sibling model stays invisible to a
model's session.
"""

import email
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.2.9"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "house", "typecheck", "tests"]

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each process would compile all that it imports

ROOT = Path(__file__).parent
TRAINED = {
    path.parent.name: path.parent.relative_to(ROOT).as_posix()
    for wing in ("models", "experiments")
    for path in sorted(ROOT.glob(f"{wing}/*/pyproject.toml"))
}
FOLDERS = {"core": "core"} | TRAINED
EXTRAS = ["data", "hf", "tensorboard"]
TORCH = "torch==2.13.0"  # what CI runs on; docs/decisions/0002-torch-range.md
CUDA_BUILD = "torch==2.14.1"
TEST_TOOLS = ["hatchling>=1.27", "packaging>=24", "pytest>=8", "pytest-xdist>=3.6", "transformers>=5"]
ONE_THREAD = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
"""Tests and their ranks share the cores: a pool of threads in each would have them wait for one another."""
SIDE_BY_SIDE = ["--numprocesses=auto", "--maxprocesses=4", "--dist=worksteal"]  # docs/decisions/0012

each_package = nox.parametrize("package", [nox.param(name, id=name, tags=[name]) for name in FOLDERS])


@nox.session(default=False)
def shared(session: nox.Session) -> None:
    """Install what our packages need of others, core's extras and the test tools, once for all sessions."""
    session.install("--no-compile", TORCH, *third_party())  # what is imported, a third of it, is compiled then


def third_party() -> list[str]:
    """What the tests of all packages need from others."""
    projects = [nox.project.load_toml(ROOT / folder / "pyproject.toml")["project"] for folder in FOLDERS.values()]
    extras = [requirement for extra in EXTRAS for requirement in projects[0]["optional-dependencies"][extra]]
    needs = [each for project in projects for each in project["dependencies"] if not each.startswith("armature-")]
    return [*dict.fromkeys(needs), *extras, *TEST_TOOLS]


def see_shared(session: nox.Session) -> Path:
    """Let the session's environment see the shared one; returns the shared site-packages."""
    environment = Path(session.virtualenv.location).resolve()
    own = session.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", silent=True)
    inner = Path(own.strip()).resolve().relative_to(environment)
    theirs = environment.with_name("shared") / inner
    (environment / inner / "shared.pth").write_text(f"{theirs}\n")
    return theirs


def install(session: nox.Session, package: str) -> None:
    """Install one of our packages; a model brings core, and an experiment its models."""
    see_shared(session)
    session.install("--no-build-isolation", f"./{FOLDERS[package]}")


@nox.session
def lint(session: nox.Session) -> None:
    """Check the style and the format with ruff."""
    session.install("ruff>=0.14")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def house(session: nox.Session) -> None:
    """Check the rules that are text: floors, circles, budgets and their like."""
    session.install("pytest>=8")
    session.run("python", "-m", "pytest", "tests", *session.posargs)


@nox.session(requires=["shared"])
def typecheck(session: nox.Session) -> None:
    """Check the types with pyrefly."""
    session.install("pyrefly>=1.5,<1.6")  # each minor release finds more
    paths = [f"--search-path={folder}/src" for folder in FOLDERS.values()]
    session.run("pyrefly", "check", f"--site-package-path={see_shared(session)}", *paths)


@nox.session(requires=["shared"])
@each_package
def tests(session: nox.Session, package: str) -> None:
    """Train a package's debug recipe for five steps, then run its tests, both from its installed copy.

    Arguments after -- go to pytest, and with such nothing is trained.
    """
    install(session, package)
    if package in TRAINED and not session.posargs:
        run_debug(session, package, "--training.steps", "5")
    session.run("python", "-m", "pytest", f"{FOLDERS[package]}/tests", *SIDE_BY_SIDE, *session.posargs, env=ONE_THREAD)


@nox.session(default=False, requires=["shared"])
def matrix(session: nox.Session) -> None:
    """Compare every model in every layout with one rank, and print the table of docs/layouts.md (about an hour)."""
    run_marked(session, "layout or matrix")


@nox.session(default=False, requires=["shared"])
def faults(session: nox.Session) -> None:
    """Kill runs at random moments of their saves, fail their disks at every point, change files at random (an hour)."""
    run_marked(session, "faults", "-rP")


def run_marked(session: nox.Session, marks: str, *options: str) -> None:
    """Run the tests of all packages that have these marks, which CI leaves out."""
    for package in TRAINED:
        install(session, package)
    tests = [f"{folder}/tests" for folder in FOLDERS.values()]
    session.run("python", "-m", "pytest", *tests, "-m", marks, *options, *session.posargs, env=ONE_THREAD)


@nox.session(default=False, requires=["shared"])
def soak(session: nox.Session) -> None:
    """Train for 20,000 tiny steps, alone and with two ranks, and see that nothing grows (SOAK_STEPS: a shorter one)."""
    install(session, "core")
    session.run("python", "-m", "pytest", "core/tests", "-m", "soak", "-rP", *session.posargs)


@nox.session(default=False, requires=["shared"])
def installs(session: nox.Session) -> None:
    """Install models by an old pip, the newest, and uv, from a checkout and from git (ten minutes, needs git)."""
    see_shared(session)  # and none of our packages, which the environments of the test would see as installed
    session.install("uv")
    session.run("python", "-m", "pytest", "core/tests/test_installers.py", "-m", "installs", *session.posargs)


PEERS = ["litgpt==0.5.13", "torchtitan==0.3.0", "megatron-core==0.16.1", "torchao==0.18.0"]
THEIR_NEEDS = [
    "lightning==2.6.6", "torchmetrics==1.9.0", "lightning-utilities==0.15.3", "pytorch-lightning==2.6.6",
    "jsonargparse==4.53.0", "psutil==7.2.2", "requests==2.34.2", "torchdata==0.11.0", "torch_checkpointing==0.1.1",
    "einops==0.8.2", "spmd_types==0.2.3", "peft==0.21.2", "accelerate==1.15.0", "bitsandbytes==0.50.2",
]  # fmt: skip


@nox.session(default=False, requires=["shared"])
def peers(session: nox.Session) -> None:
    """Let litgpt, torchtitan and megatron-core write tiny models, and read them; let lm_eval and peft read ours."""
    for package in ("llama3", "qwen3", "gpt_oss"):
        install(session, package)
    session.install("--no-deps", *PEERS, *THEIR_NEEDS)  # their requirements would bring another torch's world
    session.install("lm-eval[hf]==0.4.13", TORCH)
    tests = [f"{FOLDERS[package]}/tests" for package in ("llama3", "qwen3", "gpt_oss")]
    session.run("python", "-m", "pytest", *tests, "-m", "peers", *session.posargs)
    tests += ["core/tests/data/test_token_files.py", "core/tests/quantization"]
    session.run("python", "-m", "pytest", *tests, "-k", "its_own or own_reader or peft or bitsandbytes or torchao")


@nox.session(default=False, requires=["shared"])
def browser(session: nox.Session) -> None:
    """Open the page of core.report in a headless Chromium: the machine's, or else one that playwright downloads."""
    install(session, "core")
    session.install("playwright>=1.50")
    if shutil.which("chromium") is None:
        session.run("playwright", "install", "--with-deps", "chromium")
    session.run("python", "-m", "pytest", "core/tests/report", "-m", "browser", *session.posargs)


@nox.session(default=False, requires=["shared"])
def evals(session: nox.Session) -> None:
    """Run tasks of lm_eval on models, and on their exports with lm_eval's own backend (minutes)."""
    for package in ("qwen3", "hf_models"):
        install(session, package)
    session.install("lm-eval[hf]>=0.4.9")
    places = "models/qwen3/tests", "experiments/hf_models/tests"
    session.run("python", "-m", "pytest", *places, "-m", "evals", *session.posargs)


@nox.session(default=False, requires=["shared"])
def loggers(session: nox.Session) -> None:
    """Report to Weights & Biases, Trackio and MLflow, all on this machine (a minute)."""
    install(session, "core")
    session.install("wandb>=0.19", "trackio>=0.20", "mlflow-skinny>=3", "sqlalchemy>=2,<2.1", "alembic>=1.13")
    session.run("python", "-m", "pytest", "core/tests/train/test_loggers.py", "-m", "loggers", *session.posargs)


@nox.session(default=False, requires=["shared"])
def stories(session: nox.Session) -> None:
    """Follow the documents as three newcomers do, each in a fresh environment, and say how long it took (minutes)."""
    install(session, "qwen3")
    constraint = Path(session.create_tmp()).resolve() / "constraint.txt"
    constraint.write_text(f"{TORCH}\n")
    session.env["PIP_CONSTRAINT"] = str(constraint)
    session.run(
        "python", "-m", "pytest", "models/qwen3/tests/test_stories.py", "-m", "stories", "-rP", *session.posargs
    )


@nox.session(default=False)
@nox.parametrize("release", [nox.param(name, id=f"torch-{name}") for name in ("2.11", "2.12", "2.14", "2.15")])
def releases(session: nox.Session, release: str) -> None:
    """Run the tests of all packages on a release of torch that CI does not run on (gigabytes, an hour)."""
    session.install(f"torch=={release}.*", *third_party())
    for folder in FOLDERS.values():
        session.install("--no-build-isolation", f"./{folder}")
    session.run("python", "-m", "pytest", *SIDE_BY_SIDE, *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def cuda_build(session: nox.Session) -> None:
    """Do what a newcomer does on a torch for CUDA where there is no GPU, or none to be seen (gigabytes, minutes)."""
    session.install(CUDA_BUILD, "pytest>=8")
    for folder in FOLDERS.values():
        session.install(f"./{folder}")
    of_drivers, on_fake_gpus = "core/tests/runtime/test_device.py", "core/tests/nn/test_kernels_without_a_gpu.py"
    session.run("python", "-m", "pytest", of_drivers, on_fake_gpus)
    session.env["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as away, session.chdir(away):
        session.run("python", "-m", "core.doctor")
        for recipe in debug_recipes():
            train_and_write(session, *recipe)


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """Measure what a GPU does with all this, eight minutes; in small where there is none (gigabytes; docs/gpu.md)."""
    try:
        session.install(CUDA_BUILD, *(f"./{folder}" for folder in TRAINED.values()))
    except CommandFailed:
        session.error(
            f"{CUDA_BUILD} and our packages could not be installed, as where there is no network: "
            "`python benchmarks/gpu.py` takes the torch that the machine has, and this checkout"
        )
    session.run("python", "benchmarks/gpu.py", *session.posargs)


def debug_recipes() -> Iterator[tuple[str, str]]:
    """The packages that train, each with its debug recipes."""
    for package, folder in TRAINED.items():
        text = (ROOT / folder / f"src/{package}/configs.py").read_text(encoding="utf-8")
        yield from ((package, recipe) for recipe in re.findall(r"^def (\w+_debug)\(", text, re.MULTILINE))


def train_and_write(session: nox.Session, package: str, recipe: str) -> None:
    """Plan a recipe, train it for a few steps on one rank and on two, and have it write."""
    train = ["-m", f"{package}.train", "--config", recipe, "--training.steps", "3"]
    session.run("python", *train, "--dry-run", "--world-size", "2")
    session.run("torchrun", "--nproc-per-node", "2", *train)
    session.run("python", *train, "--dump_folder", recipe)
    generate = ["-m", f"{package}.generate", "--checkpoint", recipe]
    if (ROOT / FOLDERS[package] / f"src/{package}/generate.py").exists():
        session.run("python", *generate, "--prompt", "def main", "--max-new-tokens", "16")


def run_debug(session: nox.Session, package: str, *options: str) -> None:
    """Train a package's debug recipe in a folder outside the checkout."""
    with tempfile.TemporaryDirectory() as away, session.chdir(away):
        session.run("python", "-m", f"{package}.train", "--config", f"{package}_debug", *options)


@nox.session(default=False, reuse_venv=False)
@nox.parametrize("package", [nox.param(name, id=name) for name in TRAINED])
def fresh(session: nox.Session, package: str) -> None:
    """Install as the README says, sharing nothing, and do the whole debug run."""
    session.install(FOLDERS[package])
    session.env["XDG_CACHE_HOME"] = str(Path(session.create_tmp()).resolve())  # no text that an earlier run prepared
    run_debug(session, package)


def check_wheel(session: nox.Session, wheel: Path) -> None:
    """Stop if the metadata of a wheel asks for a place instead of a version, or names a path of this machine."""
    with zipfile.ZipFile(wheel) as archive:
        text = next(archive.read(name) for name in archive.namelist() if name.endswith(".dist-info/METADATA")).decode()
    headers = email.message_from_string(text)
    places = [need for need in headers.get_all("Requires-Dist", []) if "@" in need]
    places += [f"{key}: {value}" for key, value in headers.items() if re.search(r"file:|(?<![\w:/.])/\w", value)]
    places += [str(ROOT)] * (str(ROOT) in text)
    if places:
        session.error(f"{wheel.name} names places of this machine: {places}")


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Build every wheel into dist/, and refuse one that names a path of this machine."""
    session.install("build", "hatchling>=1.27")
    for old in ROOT.glob("dist/armature_*"):
        old.unlink()
    for folder in FOLDERS.values():
        session.run("python", "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", folder)
    for wheel in sorted(ROOT.glob("dist/armature_*.whl")):
        check_wheel(session, wheel)
        session.log(f"dist/{wheel.name} is clean")
