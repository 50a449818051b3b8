"""The rules of the house. Each takes a `Tree` and gives one sentence per breach; none is a pass."""

import ast
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from source_tree import (
    FOLDERS,
    FUNCTIONS,
    Module,
    Tree,
    closure,
    drawn_tree,
    inside,
    is_tensor,
    package_files,
    public_functions,
)

FLOORS = [  # from the ground up; a package may import lower floors and itself; some rooms are yet to come
    {"core"},  # the version
    {"core.config"},  # with the one error that users see, so it lies below runtime
    {"core.runtime"},
    {"core.activation_checkpoint", "core.report"},  # the first so that a module of nn may mark a region
    {"core.nn", "core.data", "core.optim", "core.checkpoint"},
    {"core.parallel", "core.comm", "core.weights", "core.quantization"},
    {"core.step"},
    {"core.plan"},
    {"core.train", "core.generate", "core.doctor"},
    {"core.evaluate"},  # which writes as core.generate does, and is an observer of core.train
    {"core.testing", "models"},  # every package under models/, whatever its name
    {"experiments"},
]
OPTIONAL = {  # a package that a plain install lacks -> the one room that may import it; None: no room may
    "datasets": "core.data",
    "deep_ep": "core.comm",
    "huggingface_hub": "core.data",
    "lm_eval": "core.evaluate",
    "mlflow": "core.train.loggers",
    "pyarrow": "core.data",
    "tensorboard": "core.train.loggers",
    "tokenizers": "core.data",
    "torch.utils.tensorboard": "core.train.loggers",
    "torchao": None,
    "torchft": "fault_tolerance",
    "transformers": "hf_models",
    "triton": "core.comm",
    "trackio": "core.train.loggers",
    "wandb": "core.train.loggers",
}
BARRED = {  # who -> what it does without: a run is described without torch, a module knows no other rank
    "core.config": "torch",
    "core.report": "torch",
    "core.nn": "torch.distributed",
    "models": "torch.distributed",
}
KNOW_A_MESH = ["core.parallel", "graph_trainer.fsdp"]  # the second: an experiment with another way to share weights
MESH_NAMES = {"DeviceMesh", "DTensor", "distribute_tensor", "init_device_mesh"}
MESH_MODULES = ["torch.distributed._tensor", "torch.distributed.device_mesh", "torch.distributed.tensor"]
DEVICE_QUESTIONS = ["torch.accelerator"] + [
    f"torch.{kind}.{question}"
    for kind in ("cuda", "xpu", "mps", "backends.mps")
    for question in ("is_available", "device_count", "is_initialized", "current_device")
]
POLICY_WORDS = ["policy", "save_list", "op_list"]
VAGUE_WORDS = {"base", "common", "helper", "helpers", "manager", "misc", "util", "utils"}
SHARED_NAMES = {  # public names that may be defined in two rooms of core, and why
    "log": "the logger, under one name in every module",
    "main": "the entry of a program",
}
MAX_FILE, MAX_FUNCTION, MAX_MODEL = 300, 60, 2000  # lines; the last one: first-party behind `import <m>.model`
SHAPED_NAME = re.compile(r"_[A-Za-z]*[A-Z][A-Za-z0-9]*$")
SHAPE = re.compile(r"\((?:\.\.\.|\w+)(?: or \w+)?,(?: ?(?:\.\.\.|\w[\w /+]*)(?:,|(?=\))))*\)|\bany shape\b")
MACHINE_PATH = re.compile(rb"(?<![\w.-])/(?:home|root|work|Users)/")


def package(tree: Tree, name: str) -> str:
    """The unit that has a floor and that an import may leave: a room of core (core.nn), a model, an experiment."""
    top, *rest = name.split(".")
    room = ".".join([top, *rest[:1]])
    return room if room in tree.rooms or any(room in places for places in FLOORS) else top


def floor(tree: Tree, name: str) -> int | None:
    """The height of a first-party name; None for a third party's, and for one without a floor."""
    place = package(tree, name)
    place = place if inside(place, "core") else tree.wings.get(place)
    return next((height for height, places in enumerate(FLOORS) if place in places), None)


def imports_run_downwards(tree: Tree) -> Iterator[str]:
    """A package imports lower floors and itself, also inside functions: neighbours do not know each other."""
    for name, module in tree.modules.items():
        own = floor(tree, name)
        for target in sorted(module.imports):
            other = floor(tree, target)
            at_home = package(tree, target) == package(tree, name)
            if own is not None and other is not None and not at_home and other >= own:
                yield f"{name} (floor {own}) imports {target} (floor {other}): only lower floors and its own package"


def rooms_have_floors(tree: Tree) -> Iterator[str]:
    """Every room of core stands on a floor."""
    for place in sorted({package(tree, name) for name in tree.modules}):
        if floor(tree, place) is None:
            yield f"{place} has no floor: give it one in FLOORS"


def imports_make_no_circle(tree: Tree) -> Iterator[str]:
    """No module is needed by what it needs, within a room either."""
    for name in tree.modules:
        if name in closure(tree.needs, tree.needs[name]):
            yield f"{name} imports itself in a circle"


def imports_are_absolute(tree: Tree) -> Iterator[str]:
    """An import is written in full."""
    for name, module in tree.modules.items():
        for target in sorted(module.imports):
            if target.startswith("."):
                yield f"{name} imports {target}: write the whole name, from the package's root"


def faces_are_blank(tree: Tree) -> Iterator[str]:
    """An `__init__.py` holds a docstring and `__version__` at most."""
    for name, module in tree.modules.items():
        for node in module.syntax.body if module.path.name == "__init__.py" else []:
            match node:
                case ast.Expr(value=ast.Constant(value=str())) | ast.Assign(targets=[ast.Name(id="__version__")]):
                    pass
                case _:
                    yield f"{name}/__init__.py:{node.lineno}: a face hands nothing on; import a thing where it is made"


def optional_packages_keep_their_room(tree: Tree) -> Iterator[str]:
    """Only the room of an optional package imports it."""
    for name, module in tree.modules.items():
        for optional, room in OPTIONAL.items():
            if any(inside(target, optional) for target in module.mentions) and not (room and inside(name, room)):
                yield f"{name} imports {optional}: only {room or 'a test'} may"


def starting_needs_no_optional_package(tree: Tree) -> Iterator[str]:
    """`python -m <m>.train` loads no optional package until a setting asks for it."""
    for model in sorted(name for name, wing in tree.wings.items() if wing == "models"):
        for name in sorted(closure(tree.start_needs, {f"{model}.train"} & tree.modules.keys())):
            for target in sorted(tree.modules[name].start_imports):
                if any(inside(target, optional) for optional in OPTIONAL):
                    yield f"{model}.train loads {target} through {name}: import it in the function that needs it"


def barred_packages_stay_out(tree: Tree) -> Iterator[str]:
    """A run is described without torch; layers and models know no process group."""
    for name, module in tree.modules.items():
        for who, what in BARRED.items():
            if (inside(name, who) or module.wing == who) and any(inside(target, what) for target in module.mentions):
                yield f"{name} names {what}: {who} does without"


def only_parallel_knows_a_mesh(tree: Tree) -> Iterator[str]:
    """Only core.parallel, and an experiment about it, says DeviceMesh or DTensor, in an annotation either."""
    for name, module in tree.modules.items():
        words = {getattr(node, key, None) for node in module.nodes for key in ("id", "attr", "name")}
        words |= {node.value for node in module.nodes if isinstance(node, ast.Constant)}
        found = sorted(MESH_NAMES & words)
        found += sorted(target for target in module.mentions if any(inside(target, mesh) for mesh in MESH_MODULES))
        if found and not any(inside(name, room) for room in KNOW_A_MESH):
            yield f"{name} names {', '.join(found)}: only core.parallel knows a mesh"


def one_module_asks_for_devices(tree: Tree) -> Iterator[str]:
    """What the machine computes on is asked of core.runtime.device, in tests and benchmarks as well."""
    for path in tree.files:
        name = tree.short(path)
        if path.suffix != ".py" or name in ("core/src/core/runtime/device.py", "core/tests/runtime/test_device.py"):
            continue
        mentions = Module(name, path, "").mentions
        for target in sorted(target for target in mentions for ask in DEVICE_QUESTIONS if inside(target, ask)):
            yield f"{name} names {target}: ask core.runtime.device, which knows builds without a device"


def models_hold_no_policy(tree: Tree) -> Iterator[str]:
    """A model says what a block is: no op list, no checkpoint policy, no layout."""
    for name, module in tree.modules.items():
        if module.wing != "models":
            continue
        defined = {node.name for node in module.nodes if isinstance(node, FUNCTIONS | ast.ClassDef)}
        defined |= {node.id for node in module.nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        for word in sorted(defined):
            if any(part in word.lower() for part in POLICY_WORDS):
                yield f"{name} defines {word}: the one policy and the one list of ops are core's"
        if any(inside(target, "torch.ops") for target in module.mentions):
            yield f"{name} names torch.ops: an op declares itself in core, where it is defined"
        if name.endswith(".parallelize"):
            yield f"{name}: core.parallel lays every model out"


def names_are_plain(tree: Tree) -> Iterator[str]:
    """A Python file or folder is named after what it holds."""
    for path in tree.files:
        words = {word for part in path.relative_to(tree.root).with_suffix("").parts for word in part.split("_")}
        for word in sorted(words & VAGUE_WORDS if path.suffix == ".py" else ()):
            yield f"{tree.short(path)}: '{word}' does not say what is in it"


def names_mean_one_thing(tree: Tree) -> Iterator[str]:
    """A public name at the top of a module of core is defined in one room; the exceptions have their reasons."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for name, module in tree.modules.items():
        if module.wing == "core":
            for defined in public_names(module.syntax):
                rooms[defined].add(package(tree, name))
    for defined, places in sorted(rooms.items()):
        if len(places) > 1 and defined not in SHARED_NAMES:
            yield f"{defined} is defined in {', '.join(sorted(places))}: one word for one thing"


def public_names(syntax: ast.Module) -> Iterator[str]:
    """What the statements of a module define, the names with an underscore in front left out."""
    for node in syntax.body:
        if isinstance(node, ast.ClassDef | FUNCTIONS):
            names = [node.name]
        else:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [part.id for target in targets if target for part in ast.walk(target) if isinstance(part, ast.Name)]
        yield from (name for name in names if not name.startswith("_"))


def names_of_tests_are_unique(tree: Tree) -> Iterator[str]:
    """pytest takes a test file by its bare name: no two alike, and no package among them."""
    tests = [path for path in tree.files if path.suffix == ".py" and "tests" in path.relative_to(tree.root).parts]
    for name, count in sorted(Counter(path.name for path in tests).items()):
        if name == "__init__.py" or (count > 1 and name != "conftest.py"):
            places = ", ".join(tree.short(path) for path in tests if path.name == name)
            yield f"{name} among the tests ({places}): the name of a test file is unique, its folder is no package"


def budgets_hold(tree: Tree) -> Iterator[str]:
    """Files, functions, and what one must read to understand a model stay short; tables of data do not count."""
    for name, module in tree.modules.items():
        if module.n_lines > MAX_FILE:
            yield f"{name} has {module.n_lines} lines, {MAX_FILE} is the limit: split it by idea, or simplify"
        for node in module.nodes:
            if isinstance(node, FUNCTIONS):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION:
                    yield f"{name}.{node.name} has {length} lines, {MAX_FUNCTION} is the limit"
        if module.wing == "models" and name.endswith(".model"):
            total = sum(tree.modules[behind].n_lines for behind in closure(tree.needs, [name]))
            if total > MAX_MODEL:
                yield f"{name} takes {total} first-party lines to read, {MAX_MODEL} is the limit"


def text_names_no_machine(tree: Tree) -> Iterator[str]:
    """No file, binary ones included, names a folder that only one machine has."""
    for path in tree.files:
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            if found := MACHINE_PATH.search(line):
                yield f"{tree.short(path)}:{number} names {found[0].decode()}: a path of one machine"


def ci_runs_the_readme(tree: Tree) -> Iterator[str]:
    """`.ci/run` is executable and ends with a line of the README."""
    readme, ci = tree.root / "README.md", tree.root / ".ci/run"
    lines = [line.strip() for line in readme.read_text(encoding="utf-8").splitlines()] if readme.is_file() else []
    command = ci.read_text(encoding="utf-8").strip().splitlines()[-1] if ci.is_file() else ""
    if not command or command not in lines:
        yield f".ci/run ends with '{command}', which is no line of README.md"
    elif not os.access(ci, os.X_OK):
        yield ".ci/run is not executable: chmod +x .ci/run"


def readme_draws_the_tree(tree: Tree) -> Iterator[str]:
    """README's file tree names every folder at the top and every module of a package, and nothing that is not there."""
    drawn, there = drawn_tree(tree), package_files(tree)
    for top in FOLDERS:
        if (tree.root / top).is_dir() and top not in drawn and not top.startswith("."):
            yield f"README.md's tree has no {top}/"
    for folder, packages in sorted(there.items()):
        for file in sorted(set.intersection(*packages) - drawn.get(folder, set())):
            yield f"README.md's tree does not name {folder}/{file}"
    for folder, files in sorted(drawn.items()):
        found = there.get(folder) or [{path.name for path in (tree.root / folder).glob("*.py")}]
        if "<" not in folder and not (tree.root / folder).is_dir():
            yield f"README.md's tree names {folder}/, which is not there"
        for file in sorted(files - set.intersection(*found)):
            yield f"README.md's tree names {folder}/{file}, which is not there"


def tensors_have_shapes(tree: Tree) -> Iterator[str]:
    """A public function that takes tensors names their shapes: in the names (`x_BLD`), or in words "(B, L, D)"."""
    for name, module in tree.modules.items():
        if inside(name, "core.testing"):
            continue
        for function, words in public_functions(tree, module):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            unknown = [each.arg for each in arguments if is_tensor(each) and not SHAPED_NAME.search(each.arg)]
            if unknown and not SHAPE.search(words):
                yield f"{name}.{function.name} says no shape of {', '.join(unknown)}"


RULES: list[Callable[[Tree], Iterator[str]]] = [
    imports_run_downwards,
    rooms_have_floors,
    imports_make_no_circle,
    imports_are_absolute,
    faces_are_blank,
    optional_packages_keep_their_room,
    starting_needs_no_optional_package,
    barred_packages_stay_out,
    only_parallel_knows_a_mesh,
    one_module_asks_for_devices,
    models_hold_no_policy,
    names_are_plain,
    names_mean_one_thing,
    names_of_tests_are_unique,
    budgets_hold,
    text_names_no_machine,
    ci_runs_the_readme,
    readme_draws_the_tree,
    tensors_have_shapes,
]
