"""What a run sets of torch.compile."""

from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor

from core.step.compiler import skip_vector_trials
from core.step.loss import CrossEntropy

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
