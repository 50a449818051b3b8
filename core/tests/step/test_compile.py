"""What a run sets of torch.compile, and what it needs of the machine."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch._inductor.config as inductor
from torch._dynamo.utils import counters
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from core.config.errors import UserError
from core.runtime.meta import meta_model
from core.step import inductor_cpu
from core.step.assemble import block_compiler, compile_block
from core.step.checks import check_model
from core.step.compiler import compiler_problem, skip_vector_trials
from core.step.loss import CrossEntropy
from core.step.settings import Compile
from core.testing.toy import Toy, on_cpu
from core.train.trainer import Trainer

NEW, OLD, BROKEN = "exit 0", "case $* in *avx512f*) exit 1;; esac", "exit 1"


def compiler(folder: Path, does: str) -> tuple[str]:
    """A C++ compiler that does this, as Inductor's setting names it."""
    script = folder / "c++"
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    return (str(script),)


@pytest.mark.parametrize(
    ("capability", "does", "found"),
    [
        ("AVX512", NEW, True),
        ("AVX2", OLD, True),
        ("DEFAULT", NEW, None),
        ("AVX512", OLD, None),
        ("AVX512", BROKEN, None),
    ],
)
def test_vectors_that_pytorch_and_the_compiler_have_are_not_tried(
    capability: str, does: str, found: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with inductor.patch({"cpp.vec_isa_ok": None, "cpp.cxx": compiler(tmp_path, does)}):
        skip_vector_trials("inductor")
        assert inductor.cpp.vec_isa_ok is found


def test_what_the_user_says_of_vectors_holds() -> None:
    with inductor.patch({"cpp.vec_isa_ok": False}):
        skip_vector_trials("inductor")
        assert inductor.cpp.vec_isa_ok is False


def test_a_loss_that_is_compiled_without_blocks_skips_trials_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch, "compile", lambda function, backend: function)
    with inductor.patch({"cpp.vec_isa_ok": None, "cpp.cxx": compiler(tmp_path, NEW)}):
        CrossEntropy(CrossEntropy.Config(), compile_backend="inductor")
        assert inductor.cpp.vec_isa_ok is True


@torch.no_grad()
def test_a_process_may_compile_one_model_after_another() -> None:
    """PyTorch compiles a function 8 times in all, and a block is compiled anew for each width."""
    tokens_BL = torch.zeros(1, 4, dtype=torch.long)
    for dim in range(16, 16 * 10, 16):
        model, compile_block = (
            on_cpu(Toy.Config(dim=dim, n_layers=1)),
            block_compiler(Compile(enable=True, backend="eager")),
        )
        assert compile_block is not None
        for block in model.layers.values():
            compile_block(block)
        model(tokens_BL)


@pytest.fixture
def check() -> Iterator[Callable[[Compile, str], None]]:
    """What checks a run of a toy with such settings, as `Trainer` does before it has memory."""
    model = meta_model(Toy.Config())

    def checked(compiling: Compile, device: str = "cpu") -> None:
        compiler_problem.cache_clear()
        check_model(model, Trainer.Config(model=Toy.Config(), compile=compiling), torch.device(device))

    yield checked
    compiler_problem.cache_clear()


def test_a_run_without_a_compiler_of_c_is_refused(check: Callable[..., None], tmp_path: Path) -> None:
    """None at all, or one that ends as a compiler does that is older than an option; only where one is needed."""
    compiling = Compile(enable=True)
    check(compiling)
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(UserError, match="needs a C.. compiler: .*no-such-compiler.*install a newer g"):
            check(compiling)
        check(Compile(enable=True, components=["loss"]))  # cross-entropy is not compiled on a CPU
        check(Compile(enable=True, backend="aot_eager"))
        check(Compile())
        check(compiling, "meta")
    old = tmp_path / "g++"
    old.write_text("#!/bin/sh\necho g++ 4.8.5; [ $1 = --version ] || { echo 'error: no -march=native' >&2; exit 1; }\n")
    old.chmod(0o755)
    with inductor.patch({"cpp.cxx": (None, str(old))}):
        with pytest.raises(UserError, match='g\\+\\+ ends with "error: no -march=native"; install a newer'):
            check(compiling)


NO_HEADER = 'case $1 in --version) echo g++;; *) grep -q Python.h "$1" && echo "error: no Python.h" >&2; exit 1;; esac'


@pytest.mark.parametrize(("does", "error"), [(NO_HEADER, "no Python.h"), ("echo g++", "ends well and writes nothing")])
def test_a_compiler_that_makes_nothing_is_told(
    check: Callable[..., None], does: str, error: str, tmp_path: Path
) -> None:
    with inductor.patch({"cpp.cxx": compiler(tmp_path, does)}), pytest.raises(UserError, match=error):
        check(Compile(enable=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # Inductor imports what uses it
def test_the_kernels_of_a_graph_are_compiled_in_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a forward and of its backward, which compute what eager does."""
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", inductor_cpu.cpp_pybinding)
    files: list[str] = []
    load = CppPythonBindingsCodeCache.load_async.__func__

    def counted(cls: type, text: str, *args: Any, **settings: Any) -> Any:
        files.append(text)
        return load(cls, text, *args, **settings)

    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_async", classmethod(counted))
    weight = torch.randn(24, 24, generator=torch.Generator().manual_seed(0)) / 5

    def stack(x: torch.Tensor, scale: float) -> torch.Tensor:
        for number in range(8):
            x = torch.sin(x + number * scale) @ weight
        return x.relu() + number

    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    skip_vector_trials("inductor")
    with inductor.patch({"compile_threads": 2, "fx_graph_cache": False}):
        found = torch.compile(stack, fullgraph=True)(x, 0.5)
        (gradient,) = torch.autograd.grad(found.sum(), x)
    expected = stack(x, 0.5)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0])
    n_kernels = [len(re.findall(r"^namespace in_kernel_", text, re.MULTILINE)) for text in files]
    assert sum(n_kernels) >= 12 and len(files) <= sum(n_kernels) // inductor_cpu.LEAST, n_kernels


@pytest.mark.parametrize("vec_length", [8, 16])
def test_what_is_not_simplified_has_the_same_strides(vec_length: int) -> None:
    """Of polynomials; what holds a quotient or a rest goes to Inductor."""
    x, y, rows = sympy.symbols("d0 d1 s0", integer=True, positive=True)
    for index in (x, 256 * x + y, 256 * (x + y), rows * x + 3 * y, x * (rows + 1) + rows * y, y, sympy.Integer(7)):
        assert inductor_cpu.simplify_index_in_vec_range(index, x, vec_length) is index
        simplified = inductor_cpu.simplify_any(index, x, vec_length)
        assert inductor_cpu.strides.stride_at(index, x) == inductor_cpu.strides.stride_at(simplified, x)
    for index in (FloorDiv(x, 16) + y, 64 * ModularIndexing(x, 1, 16) + y, x + FloorDiv(y, 2)):
        simplified = inductor_cpu.simplify_index_in_vec_range(index, x, vec_length)
        assert simplified == inductor_cpu.simplify_any(index, x, vec_length)
    assert not inductor_cpu.simplify_index_in_vec_range(FloorDiv(x, 16) + y, x, vec_length).has(x)


class _Tripled(torch.autograd.Function):
    """2 x, with a gradient of 3."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 3


class _Fivefold(_Tripled):
    """2 x, with a gradient of 5."""

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 5


class _Through(torch.nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(x).sin()


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # dynamo does, torch 2.13
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_later_process_finds_graphs_of_functions_with_a_gradient_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that differ in their gradients alone are told apart."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for function, factor, hits in ((_Tripled, 3, 0), (_Fivefold, 5, 0), (_Tripled, 3, 1), (_Fivefold, 5, 1)):
        torch._dynamo.reset()
        counters.clear()
        block = _Through(function)
        compile_block(block, "inductor")
        x = torch.linspace(-1, 1, 64, requires_grad=True)
        (gradient,) = torch.autograd.grad(block(x).sum(), x)
        torch.testing.assert_close(gradient, factor * torch.cos(2 * x.detach()))
        assert counters["aot_autograd"]["autograd_cache_hit"] == hits
