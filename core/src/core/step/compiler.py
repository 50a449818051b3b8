"""The C++ compiler that torch.compile calls on a CPU, and the vectors that it may use."""

import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from core.config.errors import UserError

VECTOR_FLAGS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
}
"""What a compiler is told of the vectors that PyTorch's kernels use, by PyTorch's name for them."""

TRIAL = "#include <Python.h>\n#include <c10/macros/Macros.h>\nint trial() { return 0; }\n"
"""A program that reads the headers of both that kernels need."""


def skip_vector_trials(backend: str) -> None:
    """Have Inductor take the vectors of this CPU for granted where PyTorch's own kernels use them and the compiler has
    them: it would compile programs to try each kind, a quarter of what a first step costs. It holds for all that the
    process compiles; TORCHINDUCTOR_VEC_ISA_OK goes before."""
    if backend != "inductor":
        return
    import torch._inductor.config as inductor  # a second, which a run without a compiler saves

    flags = VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability())
    if inductor.cpp.vec_isa_ok is None and flags and compiler_knows(flags):
        inductor.cpp.vec_isa_ok = True


def compiler_knows(flags: tuple[str, ...]) -> bool:
    """Whether the C++ compiler that Inductor calls takes these flags; asked with an empty file. False without one."""
    from torch._inductor import cpp_builder, exc  # as above

    try:
        words = [cpp_builder.get_cpp_compiler(), *flags, "-x", "c++", "-E", os.devnull]
        return subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except (exc.InvalidCxxCompiler, OSError):
        return False


def check_compiler() -> None:
    """Raise `UserError` where Inductor is to compile for a CPU, and no C++ compiler works."""
    if problem := compiler_problem():
        raise UserError(
            f"compile.enable on a cpu needs a C++ compiler: {problem}; install a newer g++, name another with CXX=... "
            "in the environment, or leave compile.enable off"
        )


@cache
def compiler_problem() -> str | None:
    """Why the C++ compiler makes nothing of a small program with Inductor's options; None where it does."""
    skip_vector_trials("inductor")
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions, get_cpp_compiler  # as above
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        get_cpp_compiler()
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "trial.cpp")
            source.write_text(TRIAL)
            options = CppTorchDeviceOptions(vec_isa=pick_vec_isa(), device_type="cpu")
            trial = CppBuilder("trial", str(source), options, output_dir=folder)
            trial.build()
            if not Path(trial.get_target_file_path()).exists():
                return f"{get_cpp_compiler()} ends well and writes nothing"
    except (InvalidCxxCompiler, OSError) as error:
        return str(error)
    except CppCompileError as error:
        lines = [line for line in error.output.splitlines() if "error" in line] or [error.output.strip()]
        return f'{error.cmd[0]} ends with "{lines[0].strip()}"'
    return None
