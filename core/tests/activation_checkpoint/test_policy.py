"""The decisions of the one policy, one by one, and that it is one object for one set of settings."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

import core.comm.ops
import core.nn.grouped  # noqa: F401 - their operations are on the list, here and in other processes
from core.activation_checkpoint.policy import default_activation_checkpoint_policy
from core.activation_checkpoint.region import kept, recomputed
from core.activation_checkpoint.replay import SAVED
from core.activation_checkpoint.save_output import OURS, save_output
from core.config.errors import UserError

aten = torch.ops.aten
SAVE, RECOMPUTE = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
A = torch.empty(5, 3)
"""A left-hand side of five rows."""


def weight(n_in, n_out):
    return torch.empty(n_in, n_out)


def in_forward():
    context = SelectiveCheckpointContext(is_recompute=False)
    context.op_output = None  # no argument before torch 2.12
    return context


def decisions(calls, **settings):
    """What the policy says to calls (operation, arguments...) of one block, S for save, r for recompute."""
    forward, _ = default_activation_checkpoint_policy(**settings)()
    context = in_forward()
    answers = {SAVE: "S", RECOMPUTE: "r"}
    return "".join(answers[forward.policy_fn(context, op, *args)] for op, *args in calls)


def mm(n_in=3, n_out=4):
    return aten.mm.default, A, weight(n_in, n_out)


def addmm(n_in=3, n_out=4):
    return aten.addmm.default, torch.empty(n_out), A, weight(n_in, n_out)


def linear(n_in=3, n_out=4):
    return aten.linear.default, A, weight(n_in, n_out).t()


SILU = (aten.silu.default, A)
TOPK = (aten.topk.default, A, 2)
GROUPED = (aten._grouped_mm.default, A, torch.empty(2, 3, 4))
BATCHED = (aten.bmm.default, torch.empty(1, 5, 3), torch.empty(1, 3, 4))
ATTENTION = (aten._scaled_dot_product_flash_attention_for_cpu.default, A, A, A)
OTHERS = [TOPK, GROUPED, BATCHED, ATTENTION, (torch.ops._c10d_functional.all_to_all_single.default, A)]


@pytest.mark.parametrize("product", [mm, addmm, linear])
def test_every_second_product_is_computed_again(product):
    assert decisions([product()] * 7) == "SrSrSrS"


def test_products_are_counted_together_and_nothing_else_is():
    assert decisions([mm(), *OTHERS, addmm(), SILU, linear(), *OTHERS, mm()]) == "S" + "SSSSS" + "rrS" + "SSSSS" + "r"


def test_counting_restarts_with_every_call_of_a_block():
    assert [decisions([mm()]) for _ in range(3)] == ["S", "S", "S"]
    policy = default_activation_checkpoint_policy()
    context = in_forward()
    (first, _), (second, _) = policy(), policy()
    op, *args = mm()
    assert [block.policy_fn(context, op, *args) for block in (first, second, first, second)] == [
        SAVE,
        SAVE,
        RECOMPUTE,
        RECOMPUTE,
    ]


@pytest.mark.parametrize("product", [mm, addmm, linear])
def test_forced_shapes_are_computed_again_and_not_counted(product):
    forced = {"recompute_shapes": frozenset({(3, 4)})}
    calls = [product(3, 4), product(3, 8), product(3, 4), product(3, 4), product(3, 8), product(3, 8)]
    assert decisions(calls, **forced) == "rSrrrS"
    assert decisions([product(4, 3)] * 2, **forced) == "Sr", "(in, out), not (out, in)"
    assert decisions(OTHERS, **forced) == "SSSSS"


def test_marks_come_first():
    with kept():
        assert decisions([mm(), mm(), SILU, TOPK]) == "SSSS"
        assert decisions([mm(), SILU, TOPK], mode="full") == "SSS"
        assert decisions([mm()], recompute_shapes=frozenset({(3, 4)})) == "S"
    with recomputed():
        assert decisions([mm(), mm(), SILU, *OTHERS]) == "rrr" + "rrrrr"
    forward, _ = default_activation_checkpoint_policy()()
    context, (op, *args) = in_forward(), mm()
    with recomputed():
        assert forward.policy_fn(context, op, *args) is RECOMPUTE
    assert forward.policy_fn(context, op, *args) is SAVE, "a marked product is not counted"
    with kept():
        assert forward.policy_fn(context, op, *args) is SAVE
    assert forward.policy_fn(context, op, *args) is RECOMPUTE, "nor is a kept one"


def test_full_saves_nothing_by_itself():
    assert decisions([mm(), SILU, *OTHERS], mode="full", save_ops=("aten.silu.default",)) == "rr" + "rrrrr"


def test_operations_of_a_user_are_saved():
    assert decisions([SILU, mm(), mm()], save_ops=("aten.silu.default",)) == "SSr"
    with pytest.raises(UserError, match="has no operation aten.sillu.default"):
        decisions([SILU], save_ops=("aten.sillu.default",))


def test_an_operation_that_registers_later_is_saved():
    assert decisions([(aten.cos.default, A)]) == "r"
    save_output(aten.cos.default)
    try:
        assert decisions([(aten.cos.default, A)]) == "S"
        default_activation_checkpoint_policy.cache_clear()
        with_cos = default_activation_checkpoint_policy().cache_hash
    finally:
        OURS.remove(aten.cos.default)
        default_activation_checkpoint_policy.cache_clear()
    assert with_cos != default_activation_checkpoint_policy().cache_hash


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize(
    ("source", "target", "saved"),
    [
        ("cuda", torch.device("cpu"), True),
        ("cuda", "cpu", True),
        ("xpu", torch.device("cpu"), True),
        ("cuda", torch.device("cuda", 1), False),
        ("cpu", torch.device("cpu"), False),
        ("cpu", torch.device("cuda"), False),
        ("cuda", None, False),
    ],
)
def test_copies_to_the_host_are_saved(mode, source, target, saved):
    forward, _ = default_activation_checkpoint_policy(mode=mode)()
    context = in_forward()
    tensor = SimpleNamespace(device=torch.device(source))
    decision = forward.policy_fn(context, aten._to_copy.default, tensor, device=target, dtype=torch.int64)
    assert decision is (SAVE if saved else RECOMPUTE)
    assert forward.policy_fn(context, aten._to_copy.default, tensor, dtype=torch.int64) is RECOMPUTE


def test_a_copy_to_the_host_as_pytorch_dispatches_it():
    forward, _ = default_activation_checkpoint_policy(debug=True)()
    SAVED.clear()
    with FakeTensorMode():
        counts = torch.empty(4, dtype=torch.int64, device="cuda")
        with forward:
            host, double = counts.to("cpu"), counts + counts
    assert host.device.type == "cpu" and double.device.type == "cuda"
    assert SAVED == {aten._to_copy.default: 1, aten.add.Tensor: 0}
    SAVED.clear()


def test_one_object_for_one_set_of_settings():
    policy = default_activation_checkpoint_policy
    settings = {
        "mode": "selective",
        "save_ops": ("aten.silu.default",),
        "recompute_shapes": frozenset({(1, 2), (3, 4)}),
    }
    assert policy(**settings) is policy(**{**settings, "recompute_shapes": frozenset({(3, 4), (1, 2)})})
    others = [
        {},
        {"mode": "full"},
        {"save_ops": ("aten.silu.default",)},
        {"recompute_shapes": frozenset({(1, 2)})},
        {"recompute_shapes": frozenset({(2, 1)})},
    ]
    found = [policy(**settings), *(policy(**other) for other in others)]
    assert len(set(map(id, found))) == len({p.cache_hash for p in found}) == len(found)
    assert all(re.fullmatch("[0-9a-f]{64}", p.cache_hash) for p in found)


def test_hash_is_the_same_in_every_process():
    code = (
        "import {0}, {1}, {2};"  # whose operations are on the list
        "from core.activation_checkpoint.policy import default_activation_checkpoint_policy as policy;"
        "shapes = frozenset({{(1, 2), (3, 4), (9, 9)}});"
        "print(policy(save_ops=('aten.silu.default',), recompute_shapes=shapes).cache_hash)"
    )
    modules = ["core.comm.ops", "core.nn.grouped", "core.nn.tiles"]
    hashes = set()
    for seed, order in (("1", modules), ("2", modules[::-1])):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code.format(*order)]
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        hashes.add(run.stdout.strip())
    assert len(hashes) == 1 and len(hashes.pop()) == 64


COMPILED_STEP = """
import json
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from core.activation_checkpoint.apply import ActivationCheckpoint
from core.testing.toy import Toy, on_cpu

model = on_cpu(Toy.Config(n_layers=4))
ActivationCheckpoint.Config(mode="selective").build(folder=Path()).apply(model)
for block in model.layers.values():
    block.compile(backend="inductor", fullgraph=True)
model(torch.arange(32).view(2, 16)).sum().backward()
print(json.dumps({**counters["stats"], **counters["aot_autograd"]}))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: install g++")
def test_a_second_process_finds_the_compiled_block(tmp_path):
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    found = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", COMPILED_STEP], env=env, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stderr
        found.append(json.loads(run.stdout.splitlines()[-1]))
    first, second = found
    assert first["unique_graphs"] == second["unique_graphs"] == 1
    assert (first["autograd_cache_miss"], first["autograd_cache_saved"]) == (1, 1)
    assert "autograd_cache_hit" not in first and "autograd_cache_bypass" not in first
    assert second["autograd_cache_hit"] == 1 and "autograd_cache_miss" not in second
