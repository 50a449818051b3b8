"""The C++ compiler that torch.compile calls on a CPU, and the vectors that it may use."""

import os
import subprocess

import torch

VECTOR_FLAGS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
}
"""What a compiler is told of the vectors that PyTorch's kernels use, by PyTorch's name for them."""


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
