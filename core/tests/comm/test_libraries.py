"""What is installed and what is said of it; what keeps a run from a library; handles as tensors; the imitations."""

import re
import sys
from pathlib import Path
from typing import Any

import fake_deep_ep
import pytest
import torch
import torch.distributed as dist
from carriers import CARRIERS, carry, dispatcher_over, sizes_for
from token_traffic import D, E, numbers_like, traffic
from torch.utils import deterministic as determinism

from core.comm import backend, packing, probe
from core.comm.transport import Sizes, bound, release
from core.config.errors import UserError
from core.doctor import PACKAGES, bfloat16_part, bfloat16_speed, optional_parts, parts_table
from core.testing.ranks import run_ranks

GPU = torch.device("cuda")
FITS = Sizes(4096, 7168, 256, 8, 8, torch.bfloat16)


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each test looks for the package anew."""
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    probe.imported.cache_clear()
    yield
    sys.modules.pop("deep_ep", None)
    probe.imported.cache_clear()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("assert False, 'CUDA_HOME is not set'", "AssertionError: CUDA_HOME is not set"),
        ("raise OSError('libnvshmem_host.so.3: cannot open')", "OSError: libnvshmem_host.so.3: cannot open"),
        ("import missing_part_of_it", "ModuleNotFoundError: No module named 'missing_part_of_it'"),
    ],
)
def test_whatever_happens_at_import_is_a_reason(
    body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep_ep").mkdir()
    (tmp_path / "deep_ep" / "__init__.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, build in (("deepep", "deepep_v2"), ("hybridep", "hybridep")):
        with pytest.raises(
            UserError, match=f"{name} cannot run: importing deep_ep failed with {said}; build it"
        ) as error:
            backend.dispatchers(name, GPU, FITS)
        assert f"git checkout {probe.COMMITS[build]}" in str(error.value)  # pyrefly: ignore[bad-index]


def test_a_package_that_is_not_there_says_how_to_build_it() -> None:
    with pytest.raises(UserError) as error:
        backend.dispatchers("deepep", GPU, FITS)
    text = str(error.value)
    assert "there is no package deep_ep; build it from source: git clone --recursive https://github.com/deeps" in text
    assert "pip install" not in text


@pytest.mark.parametrize(
    ("flavour", "runs"),
    [
        ("v1", {"deepep": "deepep_v1", "deepep_v1": "deepep_v1"}),
        ("v2.1", {"deepep": "deepep_v2", "deepep_v1": "deepep_v1", "deepep_v2": "deepep_v2"}),
        ("hybrid-11", {"deepep": "deepep_v1", "deepep_v1": "deepep_v1", "hybridep": "hybridep"}),
    ],
)
def test_a_build_is_known_by_its_classes(flavour: str, runs: dict[str, str]) -> None:
    """The newest generation of DeepEP that is there stands for deepep; another build is not taken instead."""
    there = re.escape(f"the installed deep_ep ({fake_deep_ep.install(flavour).__version__})")
    for name in ("deepep", "deepep_v1", "deepep_v2", "hybridep"):
        if name in runs:
            assert backend.installed(name, GPU) == runs[name]
        else:
            with pytest.raises(UserError, match=rf"{name} cannot run: {there} has .*Buffer, and not "):
                backend.installed(name, GPU)


@pytest.mark.parametrize(
    ("build", "changes", "said"),
    [
        ("deepep_v1", {"dim": 2880}, "multiple of 128, and model.dim is 2880: use deepep_v2 or hybridep, .* to 2944"),
        ("deepep_v1", {"dim": 2880, "n_ranks": 16}, "multiple of 256, and model.dim is 2880: .* width to 3072"),
        ("deepep_v1", {"dim": 8192}, "widths up to 8176, and model.dim is 8192"),
        ("deepep_v1", {"n_ranks": 6}, "no kernels for expert_parallel_degree 6: use 2, 4, 8, 16, .*, or deepep_v2"),
        ("deepep_v1", {"n_ranks": 2, "n_experts": 512}, "room for 128 experts on a rank, and 256 live there"),
        ("deepep_v1", {"top_k": 33}, "at most 32 experts per token, and top_k is 33"),
        (
            "deepep_v2",
            {"dtype": torch.float32},
            "training.mixed_precision_param makes tokens float32: set it to bfloat16",
        ),
        ("deepep_v2", {"dim": 2884}, "multiple of 8, and model.dim is 2884: use standard, .* to 2888"),
        ("hybridep", {"dim": 2888}, "multiple of 16, and model.dim is 2888"),
        ("hybridep", {"n_experts": 10}, "a multiple of 4 experts, and there are 10"),
        ("hybridep", {"n_tokens": 4097, "n_ranks": 2}, "4097, to be a multiple of 2 for expert_parallel_degree 2"),
    ],
)
def test_what_a_library_wants_is_said_before_anything_is_made(build: Any, changes: dict[str, Any], said: str) -> None:
    fake_deep_ep.install({"deepep_v1": "v1", "deepep_v2": "v2.1", "hybridep": "hybrid-11"}[build])
    backend.dispatchers(build, GPU, FITS)
    with pytest.raises(UserError, match=f"^parallelism.expert_parallel_comm_backend: .*{said}"):
        backend.dispatchers(build, GPU, FITS._replace(**changes))


def test_gpt_oss_is_carried_as_it_is_by_the_others() -> None:
    for build in ("deepep_v2", "hybridep"):
        assert not list(backend.ADAPTERS[build].problems(FITS._replace(dim=2880, n_experts=32, top_k=4)))


def test_the_doctor_lists_all_that_is_optional(capsys: pytest.CaptureFixture[str]) -> None:
    fake_deep_ep.install("v2.1")
    found = {part.name: part for part in optional_parts()}
    deep_ep = [f"deep_ep {build}" for build in probe.CLASSES]
    assert list(found)[:7] == ["GPU", "NCCL", "flex attention", "bfloat16", *deep_ep]
    assert list(found)[7:] == list(PACKAGES)
    assert found["deep_ep deepep_v2"].here == "ElasticBuffer of deep_ep 2.1.0"
    assert found["deep_ep hybridep"].here is None and "git checkout 94a9f8f" in found["deep_ep hybridep"].missing
    assert all(part.purpose and (part.here or part.missing) for part in found.values())
    lines = parts_table(list(found.values())).splitlines()
    assert max(map(len, lines)) <= 118 and "deep_ep deepep_v2  yes  ElasticBuffer of deep_ep 2.1.0" in lines


@pytest.mark.parametrize(("speed", "pays"), [(0.2, False), (1.1, False), (1.8, True)])
def test_the_doctor_says_where_bfloat16_pays(speed: float, pays: bool) -> None:
    part = bfloat16_part(speed)
    assert f"{speed} times the speed of float32" in (part.here or part.missing) and (part.here is not None) == pays
    assert bfloat16_speed(n=8, rounds=1) > 0


MEMBERS = [
    None,
    True,
    -3,
    2**40,
    [4, 5, 6],
    [],
    torch.arange(6, dtype=torch.int32).view(2, 3),
    torch.tensor([True, False]),
    torch.zeros(0, 4, dtype=torch.int64),
    torch.tensor(7),
    torch.randn(3, 2).to(torch.bfloat16).T,
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_handle_comes_out_as_it_went_in(device: str) -> None:
    """On a device that is not theirs, tensors of the host stay on the host."""
    here, there, layout = packed = packing.pack_handle(MEMBERS, torch.device(device))
    assert (len(here) == 0) == (device == "meta") and (len(there) == 0) == (device == "cpu")
    for before, after in zip(MEMBERS, packing.unpack_handle(packed), strict=True):
        if isinstance(before, torch.Tensor):
            assert torch.equal(before, after) and before.dtype == after.dtype
            assert (
                after.untyped_storage().nbytes() >= after.nbytes and after.storage_offset() * after.itemsize % 256 == 0
            )
        else:
            assert before == after and type(before) is type(after)
    if device == "cpu":
        packing.unpack_handle(packed)[6].fill_(9)
        assert torch.equal(packing.unpack_handle(packed)[6], MEMBERS[6]), (
            "what a library writes must not change the handle"
        )
    with pytest.raises(TypeError, match="a handle has a str"):
        packing.pack_handle(["what"], torch.device("cpu"))


def unwaited(name: str) -> list[bool]:
    """Whether the imitation's rows are NaN before somebody waits, and after."""
    transport = carry(name, dist.group.WORLD)
    x, ids, weight = traffic("mixed", dist.get_rank())
    asynchronous = {"async_finish": True} if name == "deepep v1" else {"async_with_compute_stream": True}
    sent = transport.buffer.dispatch
    transport.buffer.dispatch = lambda *args, **options: (
        events.append(sent(*args, **options, **asynchronous)) or events[-1]
    )
    events: list[Any] = []
    transport.send(x, ids, weight, E)
    rows, event = events[0][0], events[0][-1]
    before = bool(rows.isnan().all())
    event.current_stream_wait()
    return [before, bool(rows.isnan().any())]


@pytest.mark.parametrize("name", ["deepep v1", "deepep v2.1"])
def test_the_imitation_shows_who_does_not_wait(name: str) -> None:
    assert run_ranks(unwaited, 2, name) == [[True, False]] * 2


def refused(name: str) -> list[str]:
    """What the imitation says to rows of the wrong type, and the adapter to another number of tokens."""
    fake_deep_ep.WIRE[0], found = torch.bfloat16, []
    transport = carry(name, dist.group.WORLD, n_tokens=8)
    more = (None, 1) if CARRIERS[name].namespace == "hybridep" else ()
    x, ids, weight = traffic("mixed", 0, 8)
    for tokens in (x.double(), x[:7]):
        try:
            transport.dispatch(tokens, ids[: len(tokens)], weight[: len(tokens)], E, *more)
        except (AssertionError, UserError) as error:
            found.append(str(error))
    return found


def test_rows_of_another_type_and_another_number_are_refused() -> None:
    for first, second in run_ranks(refused, 2, "hybridep 11"):
        assert "rows are torch.float64" in first and "its buffers are for 8, and 7 came" in second


def in_bfloat16(name: str) -> list[torch.Tensor]:
    """A step in the library's own type, and the same tokens by the reference."""
    found: list[torch.Tensor] = []
    for carrier in (name, f"{CARRIERS[name].namespace} reference"):
        dispatcher = dispatcher_over(carrier, dist.group.WORLD, n_tokens=8)
        fake_deep_ep.WIRE[0] = torch.bfloat16
        x, ids, weight = traffic("masked", dist.get_rank(), 8)
        x = numbers_like(x, 3).bfloat16().requires_grad_()
        weight.requires_grad_()
        rows = dispatcher.dispatch(x, ids, weight, E)
        y = dispatcher.combine(rows.x_RD * rows.weight_R.unsqueeze(-1), rows.back)
        y.float().square().sum().backward()
        found += [y.detach(), x.grad, weight.grad]
        release()
    return found


@pytest.mark.parametrize("name", ["deepep v1", "deepep v2.0", "deepep v2.1", "hybridep 9", "hybridep 11"])
def test_the_type_of_the_library(name: str) -> None:
    for ours in run_ranks(in_bfloat16, 2, name):
        for found, expected in zip(ours[:3], ours[3:], strict=True):
            assert found.dtype == expected.dtype and found.any()
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def made_and_closed(name: str) -> list[Any]:
    """Buffers are made once for a group, not by layers nor in forward, and closed after a good end only."""
    group, fake = dist.group.WORLD, fake_deep_ep
    torch.use_deterministic_algorithms(True)
    assert determinism.fill_uninitialized_memory
    dispatcher = dispatcher_over(name, group, n_tokens=8)
    build = backend.ADAPTERS[CARRIERS[name].build]  # pyrefly: ignore[bad-index]
    again = backend.by_library(build, sizes_for(name, group, n_tokens=8), {}, group)
    for each in (dispatcher, again, dispatcher):
        x, ids, weight = traffic("mixed", group.rank(), 8)
        rows = each.dispatch(x, ids, weight, E)
        each.combine(rows.x_RD, rows.back)
    made = [call for call in fake.CALLS if "Buffer" in call]
    description = bound(CARRIERS[name].namespace, group.group_name).description
    try:
        raise ArithmeticError
    except ArithmeticError:
        release()
    after_error = fake.CALLS.count("destroy")
    dispatcher_over(name, group, n_tokens=8)
    release()
    return [made, description, after_error, fake.CALLS.count("destroy"), determinism.fill_uninitialized_memory]


@pytest.mark.parametrize(
    ("name", "made", "said", "closes"),
    [
        ("deepep v1", "Buffer", f"DeepEP V1 (deep_ep 1.2.1), a buffer of {D * 4 * 2 * 100:,} bytes on each rank", 1),
        (
            "deepep v2.1",
            "ElasticBuffer",
            f"DeepEP V2 (deep_ep 2.1.0), a buffer of {2 * 8 * D * 2:,} bytes on each rank",
            1,
        ),
        ("hybridep 11", "HybridEPBuffer", "HybridEP (deep_ep 1.2.1+94a9f8f), buffers for 8 tokens on each rank", 0),
    ],
)
def test_a_buffer_is_made_once_and_closed_by_all(name: str, made: str, said: str, closes: int) -> None:
    for found in run_ranks(made_and_closed, 2, name):
        assert found == [[made], said, 0, closes, False]
