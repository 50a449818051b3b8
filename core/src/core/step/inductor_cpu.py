"""Kernels that Inductor makes for a CPU, in less time: those of a graph are compiled in as many files as there are
cores, while Python goes on with its backward, and indices that are polynomials are not simplified.

Inductor writes a file of C++ for each kernel, that is for whatever lies between two matrix products: a dozen and more
for a block. Of the 0.8 s that the compiler takes for one, 0.55 are those of an empty file, which reads PyTorch's header
in compiled form. Here kernels keep their text and stand in a namespace each, with a Python module each.
"""

import re
import sys
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import sympy
import torch._functorch.config
from torch._inductor.async_compile import AsyncCompile, get_compile_threads, kernel_code_log
from torch._inductor.codecache import CppPythonBindingsCodeCache, LambdaFuture
from torch._inductor.codegen.cpp import stride_at_vec_range

from core.runtime.device import accelerator

LEAST = 4
"""A further file is worth an empty one's time for so many kernels."""
INCLUDES = "#include <Python.h>\n#include <cerrno>\n#include <cstdlib>\n#include <sstream>\n"
"""What the binding of a kernel includes, which must not happen within a namespace."""
FUNCTION = re.compile(r'(extern "C"[^(]*\s)kernel\(')
_Function = Callable[..., None]
one_by_one = AsyncCompile.cpp_pybinding
strides = sys.modules[stride_at_vec_range.__module__]  # sizevars, which was a part of codegen.cpp before torch 2.13
simplify_any = strides.simplify_index_in_vec_range


class JoinedKernels:
    """The kernels of a graph, which are compiled as soon as one of them is asked for, and waited for when called."""

    def __init__(self, submit: Callable[[Callable[[], Any]], Future[Any]]) -> None:
        """`submit` has a function called in another thread."""
        self._submit = submit
        self._sources: list[tuple[list[str], str]] = []
        self._files: list[Callable[[], _Function]] = []

    def add(self, argtypes: list[str], source: str) -> Callable[[], _Function]:
        """What returns the kernel of a `source`, whose function is called kernel and takes arguments of `argtypes`."""
        number = len(self._sources)
        self._sources.append((argtypes, source))
        return lambda: self._kernel(number)

    def _kernel(self, number: int) -> _Function:
        if not self._files:
            self._compile()
        compiled = cache(lambda: self._load(number))
        return lambda *arguments: compiled()(*arguments)

    def _load(self, number: int) -> _Function:
        name = f"kernel_{number}"
        file = self._files[number % len(self._files)]().__self__.__file__  # pyrefly: ignore[missing-attribute]
        spec = spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)

    def _compile(self) -> None:
        n_files = max(1, min(get_compile_threads(), len(self._sources) // LEAST))
        for first in range(n_files):
            numbers = range(first, len(self._sources), n_files)
            text = INCLUDES + "".join(module_text(number, *self._sources[number]) for number in numbers)
            text += 'extern "C" void kernel() {}\n'  # by which Inductor finds the file
            self._files.append(CppPythonBindingsCodeCache.load_pybinding_async([], text, submit_fn=self._submit))


def module_text(number: int, argtypes: list[str], source: str) -> str:
    """The text of a kernel in a namespace, with what makes it the function of a Python module, kernel_<number> both."""
    name = f"kernel_{number}"
    source = FUNCTION.sub(rf"\g<1>{name}(", source)
    arguments = ", ".join(f"parse_arg<{kind.replace('const ', '')}>(args, {n})" for n, kind in enumerate(argtypes))
    binding = CppPythonBindingsCodeCache.suffix_template.format(
        arg_len=len(argtypes),
        call_entry_func=f"{name}({arguments}); Py_RETURN_NONE;",
        entry_func=name,
        extra_parse_arg="",
    )
    includes = "".join(re.findall(r"^\s*#include.*\n", source, re.MULTILINE))
    return f"{includes}namespace in_{name} {{\n{source}\n{binding}\n}}\n"


def cpp_pybinding(self: AsyncCompile, argtypes: list[str], source_code: str) -> Any:
    """What waits for a kernel, in the place of Inductor's method of this name."""
    if get_compile_threads() <= 1 or len(FUNCTION.findall(source_code)) != 1:
        return one_by_one(self, argtypes, source_code)  # with one thread it is compiled at once, and not waited for
    kernel_code_log.info("CPP Kernel:\n%s", source_code)
    joined = self.__dict__.setdefault("joined", JoinedKernels(self.submit))
    return LambdaFuture(joined.add(argtypes, source_code))


def simplify_index_in_vec_range(index: sympy.Expr, var: sympy.Symbol, vec_length: int) -> sympy.Expr:
    """An index from which Inductor takes the stride of `var`, in the place of its function of this name.

    A polynomial has its stride in any form, and SymPy needs a tenth of a first step's Python to try its forms.
    """
    return index if index.is_polynomial() else simplify_any(index, var, vec_length)


@cache
def compile_header() -> None:
    """Have another thread compile PyTorch's header, which kernels include, unless it is found compiled."""
    AsyncCompile.submit(partial(CppPythonBindingsCodeCache.load_pybinding_async, [], 'extern "C" void kernel() {}\n'))


def shorten_compilation() -> None:
    """Have this process compile for a CPU in less time from now on."""
    AsyncCompile.cpp_pybinding = cpp_pybinding  # pyrefly: ignore[bad-assignment]
    strides.simplify_index_in_vec_range = simplify_index_in_vec_range  # pyrefly: ignore[missing-attribute]
    torch._functorch.config.force_non_lazy_backward_lowering = True
    if not accelerator().count:
        compile_header()
