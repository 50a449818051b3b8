"""This repository keeps the rules of the house, and each rule bites where a tree breaks it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import indent

import pytest

from house_rules import (
    MAX_FILE,
    MAX_FUNCTION,
    RULES,
    barred_packages_stay_out,
    budgets_hold,
    ci_runs_the_readme,
    faces_are_blank,
    imports_are_absolute,
    imports_make_no_circle,
    imports_run_downwards,
    models_hold_no_policy,
    names_are_plain,
    names_mean_one_thing,
    names_of_tests_are_unique,
    one_module_asks_for_devices,
    only_parallel_knows_a_mesh,
    optional_packages_keep_their_room,
    readme_draws_the_tree,
    rooms_have_floors,
    starting_needs_no_optional_package,
    tensors_have_shapes,
    text_names_no_machine,
)
from source_tree import Tree

Rule = Callable[[Tree], Iterator[str]]

NN, CONFIG, DATA, TRAIN = (f"core/src/core/{room}/thing.py" for room in ("nn", "config", "data", "train"))
MODEL, RECIPES, START = (f"models/qwen3/src/qwen3/{file}.py" for file in ("model", "configs", "train"))
ROOF = "experiments/width/src/width/run.py"
LONG_FUNCTION = "def f() -> None:\n" + "    print()\n" * (MAX_FUNCTION - 1)
SIZES = "SIZES = {\n" + "    'a': (1, 2),\n" * (MAX_FILE + 1) + "}\n"
README = """Run this:

    python -m nox

## The tree

```
core/                 what models share
  src/core/
    config/           WHAT A RUN IS
      thing.py  reader.py   settings
    nn/               LAYERS
      thing.py          a layer    other.py  as in other.txt
    data/             thing.py
    runtime/          device.py
    train/            loggers.py   thing.py
    comm/             kernels.py
    parallel/         mesh.py
models/<model>/       a model each
  src/<model>/        model.py
docs/                 pages
experiments/<name>/   an experiment each
  src/<name>/         run.py
```

Then train.py is not in it.
"""
SOMEONE = "/".join(["", "home", "someone", "corpus.txt"])

SHAPED = """
def f(x_BLD: Tensor, n: int): ...
def g(x: Tensor, mask: Tensor):
    'x (B, L, D) where the mask (B or 1, L) is set.'
def _private(x: Tensor): ...
class Layer(Module):
    'y (..., O) of x (..., I).'
    def forward(self, x: Tensor): ...
    def norm(self, x: Tensor):
        'Of x, any shape.'
class Other(Layer):
    def norm(self, x: Tensor): ...
"""

GOOD = {  # a small tree that keeps every rule, by means that come close to breaking one
    "README.md": README,
    ".ci/run": "#!/bin/sh\npython -m nox\n",
    ".gitignore": f"{SOMEONE}\n",
    "docs/notes.md": "See https://example.com/home/page and data/home/file.\n",
    "outputs/config.json": SOMEONE,
    "core/outputs/config.json": SOMEONE,
    "core/src/core/__init__.py": '"""The runtime."""\n\n__version__ = "0.1.0"\n',
    "core/src/core/config/__init__.py": "",
    CONFIG: "import dataclasses\nimport torchvision\n",
    "core/src/core/config/reader.py": "from core.config import thing\nfrom core import __version__\n",
    NN: f"import torch\nfrom core.config.thing import Config\n{SIZES}def f():\n    import core.nn.other\n",
    "core/src/core/nn/other.py": "class Shard:\n    '''Not a DTensor.'''\n" + LONG_FUNCTION,
    DATA: "def tokens():\n    import tokenizers\n",
    "core/src/core/runtime/device.py": "import torch\ntorch.accelerator.is_available()",
    "core/src/core/train/loggers.py": "def writer():\n    from torch.utils.tensorboard import SummaryWriter\n",
    "core/src/core/train/thing.py": "from core.data.thing import tokens\nimport core.train.loggers\n",
    "core/src/core/comm/kernels.py": "import triton\nimport torch.distributed\n",
    "core/src/core/parallel/mesh.py": "from torch.distributed.tensor import DTensor\n",
    "core/tests/nn/test_thing.py": "import transformers\nimport core.train.thing\n",
    "core/tests/conftest.py": "",
    "models/qwen3/tests/conftest.py": "",
    "models/qwen3/tests/test_qwen3.py": "from core.testing import suite\n",
    MODEL: "from core.nn.thing import SIZES\n" + SIZES,
    RECIPES: "from core.train.thing import tokens\nimport qwen3.model\ntokens(policy=1).policy = 2\n",
    START: "from qwen3 import configs\n",
    "models/other/src/other/model.py": "import core\n" + SHAPED,
    ROOF: "import qwen3.model\nimport core.train.thing\n",
}

WRONG: list[tuple[Rule, dict[str, str], str]] = [  # rule, files changed in the good tree, words of the breach
    (imports_run_downwards, {NN: "import core.train.thing"}, "core.nn.thing (floor 4) imports core.train.thing"),
    (imports_run_downwards, {NN: "from core import train"}, "imports core.train "),
    (imports_run_downwards, {NN: "import core.data.thing"}, "imports core.data.thing (floor 4)"),
    (imports_run_downwards, {NN: "def f():\n    from core.parallel.mesh import axis"}, "core.parallel.mesh.axis"),
    (imports_run_downwards, {NN: "if TYPE_CHECKING:\n    import core.train.thing"}, "core.train.thing"),
    (imports_run_downwards, {NN: "import importlib\nimportlib.import_module('core.train.thing')"}, "core.train.thing"),
    (imports_run_downwards, {NN: "__import__('core.train.thing')"}, "core.train.thing"),
    (imports_run_downwards, {"core/src/core/activation_checkpoint/ops.py": "import core.nn.thing"}, "core.nn.thing"),
    (imports_run_downwards, {"core/src/core/comm/kernels.py": "import core.parallel.mesh"}, "core.parallel"),
    (imports_run_downwards, {TRAIN: "from qwen3.model import Qwen3"}, "qwen3.model.Qwen3 (floor 10)"),
    (imports_run_downwards, {MODEL: "import other.model"}, "qwen3.model (floor 10) imports other.model (floor 10)"),
    (imports_run_downwards, {MODEL: "import core.testing.suite"}, "core.testing.suite"),
    (imports_run_downwards, {MODEL: "import width.run"}, "width.run (floor 11)"),
    (imports_run_downwards, {"experiments/depth/src/depth/run.py": "import width.run"}, "depth.run"),
    (rooms_have_floors, {"core/src/core/attic/thing.py": ""}, "core.attic has no floor"),
    (rooms_have_floors, {"core/src/core/attic.py": ""}, "core.attic has no floor"),
    (imports_make_no_circle, {NN: "import core.nn.other", "core/src/core/nn/other.py": "import core.nn.thing"}, "nn"),
    (
        imports_make_no_circle,
        {
            "core/src/core/nn/a.py": "def f():\n    from core.nn import b",
            "core/src/core/nn/b.py": "from core.nn.c import x",
            "core/src/core/nn/c.py": "import core.nn.a",
        },
        "core.nn.b imports itself",
    ),
    (imports_are_absolute, {NN: "from . import other"}, "core.nn.thing imports .other"),
    (imports_are_absolute, {NN: "from ..data import thing"}, "imports ..data.thing"),
    (imports_are_absolute, {NN: "import_module('.other', 'core.nn')"}, "imports .other"),
    (faces_are_blank, {"core/src/core/nn/__init__.py": "import core.nn.thing"}, "core.nn/__init__.py:1"),
    (faces_are_blank, {"core/src/core/nn/__init__.py": '"""Layers."""\n\n__all__ = []'}, "core.nn/__init__.py:3"),
    (faces_are_blank, {"models/qwen3/src/qwen3/__init__.py": "from qwen3.model import Qwen3"}, "qwen3/__init__.py:1"),
    (optional_packages_keep_their_room, {NN: "import triton.language as tl"}, "triton: only core.comm may"),
    (optional_packages_keep_their_room, {NN: "def f():\n    import deep_ep"}, "deep_ep: only core.comm"),
    (optional_packages_keep_their_room, {TRAIN: "def f():\n    import wandb"}, "only core.train.loggers may"),
    (optional_packages_keep_their_room, {TRAIN: "from torch.utils import tensorboard"}, "torch.utils.tensorboard"),
    (optional_packages_keep_their_room, {MODEL: "from datasets import Dataset"}, "datasets: only core.data may"),
    (optional_packages_keep_their_room, {DATA: "import transformers"}, "transformers: only hf_models may"),
    (optional_packages_keep_their_room, {ROOF: "import torchao"}, "torchao: only a test may"),
    (starting_needs_no_optional_package, {DATA: "import tokenizers"}, "qwen3.train loads tokenizers through core.data"),
    (starting_needs_no_optional_package, {DATA: "try:\n    import datasets\nexcept ImportError: ..."}, "datasets"),
    (barred_packages_stay_out, {CONFIG: "def f():\n    import torch"}, "core.config.thing names torch"),
    (barred_packages_stay_out, {CONFIG: "from torch.nn import Linear"}, "core.config.thing names torch"),
    (barred_packages_stay_out, {NN: "import torch as t\nt.distributed.get_rank()"}, "core.nn.thing names torch.distr"),
    (barred_packages_stay_out, {MODEL: "from torch import distributed"}, "qwen3.model names torch.distributed"),
    (only_parallel_knows_a_mesh, {TRAIN: "from torch.distributed.tensor import Shard"}, "torch.distributed.tensor.Sh"),
    (only_parallel_knows_a_mesh, {TRAIN: "import torch.distributed.device_mesh"}, "device_mesh"),
    (only_parallel_knows_a_mesh, {TRAIN: "def f(x: 'DTensor'): ..."}, "core.train.thing names DTensor"),
    (only_parallel_knows_a_mesh, {TRAIN: "import torch\ntorch.distributed.init_device_mesh()"}, "init_device_mesh"),
    (only_parallel_knows_a_mesh, {MODEL: "def f(mesh: DeviceMesh): ..."}, "qwen3.model names DeviceMesh"),
    (
        one_module_asks_for_devices,
        {TRAIN: "import torch\ntorch.accelerator.device_count()"},
        "thing.py names torch.acc",
    ),
    (
        one_module_asks_for_devices,
        {NN: "from torch.cuda import is_available"},
        "torch.cuda.is_available: ask core.runti",
    ),
    (one_module_asks_for_devices, {MODEL: "import torch as t\nt.xpu.device_count()"}, "torch.xpu.device_count"),
    (
        one_module_asks_for_devices,
        {"core/tests/nn/test_other.py": "import torch\nGPU = not torch.cuda.is_available()"},
        "core/tests/nn/test_other.py names torch.cuda.is_available",
    ),
    (models_hold_no_policy, {MODEL: "def save_policy(): ..."}, "qwen3.model defines save_policy"),
    (models_hold_no_policy, {RECIPES: "class PolicyForExperts: ..."}, "defines PolicyForExperts"),
    (models_hold_no_policy, {MODEL: "OP_LIST = set()"}, "defines OP_LIST"),
    (models_hold_no_policy, {MODEL: "def f():\n    op_save_list: list = []"}, "defines op_save_list"),
    (models_hold_no_policy, {MODEL: "import torch as t\nkept = [t.ops.aten.mm.default]"}, "names torch.ops"),
    (models_hold_no_policy, {"models/qwen3/src/qwen3/parallelize.py": ""}, "core.parallel lays every model out"),
    (names_are_plain, {"core/src/core/nn/utils.py": ""}, "core/src/core/nn/utils.py: 'utils'"),
    (names_are_plain, {"core/src/core/nn/attention_base.py": ""}, "'base'"),
    (names_are_plain, {"models/qwen3/tests/helpers/tiny.py": ""}, "'helpers'"),
    (
        names_mean_one_thing,
        {NN: "class Layout: ...", DATA: "class Layout: ..."},
        "Layout is defined in core.data, core.nn",
    ),
    (names_mean_one_thing, {NN: "LIMIT: int = 1", DATA: "LIMIT = OTHER = 2"}, "LIMIT is defined in core.data, core.nn"),
    (
        names_of_tests_are_unique,
        {"core/tests/data/test_thing.py": ""},
        "test_thing.py among the tests (core",
    ),
    (names_of_tests_are_unique, {"core/tests/__init__.py": ""}, "__init__.py among the tests"),
    (tensors_have_shapes, {NN: "def f(x: Tensor, y_BL: Tensor): ..."}, "core.nn.thing.f says no shape of x"),
    (tensors_have_shapes, {NN: "def f(xs: list[torch.Tensor] | None):\n    'Of xs (all of them).'"}, "no shape of xs"),
    (tensors_have_shapes, {NN: "class A(Module):\n    'A layer.'\n    def forward(self, x: Tensor): ..."}, "forward"),
    (tensors_have_shapes, {MODEL: "class A(B):\n    def f(self, *, x: Tensor = None): ..."}, "qwen3.model.f says"),
    (budgets_hold, {NN: "x = 1\n" * (MAX_FILE + 1)}, f"core.nn.thing has {MAX_FILE + 1} lines"),
    (budgets_hold, {NN: "sizes = [\n" + "1,\n" * MAX_FILE + "]\n"}, f"core.nn.thing has {MAX_FILE + 2} lines"),
    (budgets_hold, {NN: LONG_FUNCTION + "    print()\n"}, f"core.nn.thing.f has {MAX_FUNCTION + 1} lines"),
    (budgets_hold, {NN: "class A:\n" + indent(f"async {LONG_FUNCTION}    pass\n", "    ")}, "core.nn.thing.f has"),
    (
        budgets_hold,
        {MODEL: "\n".join(f"import core.nn.part{i}" for i in range(9))}
        | {f"core/src/core/nn/part{i}.py": "x = 1\n" * 299 for i in range(9)},
        "qwen3.model takes 2700 first-party lines",
    ),
    (text_names_no_machine, {"docs/notes.md": f"fine\nread {SOMEONE}\n"}, "docs/notes.md:2 names"),
    (text_names_no_machine, {"notes.txt": f"file://{SOMEONE}\n"}, "notes.txt:1 names"),
    (text_names_no_machine, {"core/src/core/data/default.model": f"\x00\x12{SOMEONE}\x00"}, "default.model:1 names"),
    (ci_runs_the_readme, {"README.md": "pytest\n"}, "no line of README.md"),
    (ci_runs_the_readme, {".ci/run": "python -m nox -s lint\n"}, "no line of README.md"),
    (readme_draws_the_tree, {"core/src/core/nn/new.py": ""}, "does not name core/src/core/nn/new.py"),
    (readme_draws_the_tree, {"core/src/core/doctor.py": ""}, "does not name core/src/core/doctor.py"),
    (readme_draws_the_tree, {"core/src/core/attic/old.py": ""}, "does not name core/src/core/attic/old.py"),
    (
        readme_draws_the_tree,
        {"README.md": README.replace("mesh.py", "gone.py")},
        "names core/src/core/parallel/gone.py",
    ),
    (readme_draws_the_tree, {"README.md": README.replace("docs/ ", "doc/ ")}, "names doc/, which is not there"),
    (readme_draws_the_tree, {"README.md": README.replace("docs/ ", "doc/ ")}, "has no docs/"),
    (readme_draws_the_tree, {"benchmarks/speed.py": ""}, "has no benchmarks/"),
    (
        readme_draws_the_tree,
        {"README.md": README.replace("model.py", "hf.py")},
        "models/<name>/src/<name>/hf.py, which",
    ),
    (
        readme_draws_the_tree,
        {"README.md": README.replace("model.py", "")},
        "not name models/<name>/src/<name>/model.py",
    ),
]


def plant(root: Path, files: dict[str, str]) -> Tree:
    """A repository of these files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return Tree(root)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_keeps(rule: Rule) -> None:
    breaches = list(rule(Tree(Path(__file__).parents[1])))
    assert not breaches, f"{rule.__doc__}\n  " + "\n  ".join(breaches)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_passes_a_good_tree(tmp_path: Path, rule: Rule) -> None:
    assert list(rule(plant(tmp_path, GOOD))) == []


@pytest.mark.parametrize(
    ("rule", "files", "words"), WRONG, ids=[f"{rule.__name__}-{words}" for rule, _, words in WRONG]
)
def test_rule_bites(tmp_path: Path, rule: Rule, files: dict[str, str], words: str) -> None:
    breaches = list(rule(plant(tmp_path, GOOD | files)))
    assert any(words in breach for breach in breaches), breaches


def test_every_rule_is_shown_to_bite() -> None:
    assert {rule for rule, _, _ in WRONG} == set(RULES)


def test_ci_must_be_executable(tmp_path: Path) -> None:
    tree = plant(tmp_path, GOOD)
    (tmp_path / ".ci/run").chmod(0o644)
    assert "chmod" in next(ci_runs_the_readme(tree))
