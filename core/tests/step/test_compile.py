"""What a run sets of torch.compile."""

import pytest
import torch
import torch._inductor.config as inductor

from core.step.assemble import skip_vector_trials


@pytest.mark.parametrize(("capability", "found"), [("AVX512", True), ("AVX2", True), ("DEFAULT", None)])
def test_vectors_that_pytorch_uses_are_not_tried(
    capability: str, found: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with inductor.patch({"cpp.vec_isa_ok": None}):
        skip_vector_trials()
        assert inductor.cpp.vec_isa_ok is found


def test_what_the_user_says_of_vectors_holds() -> None:
    with inductor.patch({"cpp.vec_isa_ok": False}):
        skip_vector_trials()
        assert inductor.cpp.vec_isa_ok is False
