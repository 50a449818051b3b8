"""The list of what is saved: what is on it, what may join it, and what may not."""

import pytest
import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from core.activation_checkpoint import ops
from core.activation_checkpoint.ops import absent_ops, find_op, saved_ops, user_op
from core.activation_checkpoint.policy import default_activation_checkpoint_policy
from core.activation_checkpoint.save_output import check_op, save_output
from core.config.errors import UserError
from core.testing.activation_checkpoint import checkpoint_blocks, heavy_ops
from core.testing.toy import Toy, on_cpu

aten = torch.ops.aten


def test_list_has_what_is_dear_and_not_what_is_cheap():
    names = {str(op) for op in saved_ops()}
    attention = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    assert {f"aten._scaled_dot_product_{kernel}.default" for kernel in attention} <= names
    products = ("mm", "addmm", "bmm", "linear", "_grouped_mm", "_scaled_mm", "topk", "max")
    assert {f"aten.{name}.default" for name in products} <= names
    assert {"flex_attention", "inductor_compiled_code"} <= names
    assert {f"_c10d_functional.{name}.default" for name in ("all_to_all_single", "reduce_scatter_tensor")} <= names
    assert not {name for name in names if "all_gather" in name or "silu" in name or "view" in name}
    assert all(isinstance(op, OpOverload | HigherOrderOperator) for op in saved_ops())


def test_packet_is_refused_everywhere():
    before = set(ops.OURS)
    for put in (check_op, save_output):
        with pytest.raises(TypeError, match="aten.mm is a OpOverloadPacket .*overloads: default"):
            put(aten.mm)
    with pytest.raises(TypeError, match="aten.add .*Tensor, Scalar"):
        find_op("aten.add")
    with pytest.raises(UserError, match="save_ops: aten.silu is a OpOverloadPacket.*overloads: default"):
        user_op("aten.silu")
    with pytest.raises(TypeError, match="str"):
        save_output("aten.mm.default")
    assert before == ops.OURS


@pytest.mark.parametrize(("listed", "n_products"), [(aten.mm.default, 2), (aten.mm, 3)], ids=["overload", "packet"])
def test_a_packet_would_never_match(listed, n_products):
    """What the refusal is for: with a packet PyTorch's own policy recomputes the product, and says nothing."""

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in {listed} else CheckpointPolicy.PREFER_RECOMPUTE

    x, w = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    y = checkpoint(
        lambda x: (x @ w).sin(),
        x,
        use_reentrant=False,
        early_stop=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with Count():
        y.sum().backward()
    assert calls.count(aten.mm.default) == n_products


def test_unknown_name_is_an_error(monkeypatch):
    assert find_op("aten.nonsense.default") is None and find_op("nowhere.mm.default") is None
    with pytest.raises(UserError, match=r"save_ops: torch .* has no operation aten.nonsense.default"):
        user_op("aten.nonsense.default")
    with pytest.raises(UserError, match="has no operation aten.mm.nonsense"):
        user_op("aten.mm.nonsense")
    monkeypatch.setattr(ops, "SELECTION", ("aten.topk_of_old.default",))
    with pytest.raises(AssertionError, match="has no aten.topk_of_old.default: fix the list in core.activation_check"):
        ops._pytorch_ops.__wrapped__()
    with pytest.raises(TypeError, match="packet|Packet"):
        monkeypatch.setattr(ops, "SELECTION", ("aten.topk",))
        ops._pytorch_ops.__wrapped__()


def test_an_optional_operation_is_saved_where_it_exists(monkeypatch):
    name = "armature_test.dear.default"
    monkeypatch.setattr(ops, "OPTIONAL", (*ops.OPTIONAL, name))
    saved_ops()  # loads PyTorch's higher-order operations
    assert name in absent_ops() and "higher_order.flex_attention" not in absent_ops()
    library = torch.library.Library("armature_test", "FRAGMENT")
    try:
        library.define("dear(Tensor x) -> Tensor")
        assert torch.ops.armature_test.dear.default in saved_ops()
        assert name not in absent_ops()
    finally:
        library._destroy()


def test_extra_names_join_for_one_policy():
    assert saved_ops(["aten.silu.default"]) - saved_ops() == {aten.silu.default}


@pytest.fixture
def twice():
    """A first-party operation, with the number of times that its kernel ran."""
    library = torch.library.Library("armature_test", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    ran = []

    def kernel(x):
        ran.append(x.shape)
        return x * 2

    library.impl("twice", kernel, "CPU")

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return torch.ops.armature_test.twice.default(x)

        @staticmethod
        def backward(context, gradient):
            return gradient * 2

    yield torch.ops.armature_test.twice.default, Twice.apply, ran
    ops.OURS.discard(torch.ops.armature_test.twice.default)
    library._destroy()


@pytest.mark.parametrize("registered", [False, True])
def test_an_operation_of_ours_is_saved_once_it_registers(twice, registered):
    op, apply, ran = twice
    if registered:
        assert save_output(op) is op
    x = torch.randn(4, requires_grad=True)
    policy = default_activation_checkpoint_policy()
    checkpoint(lambda x: apply(x).sin(), x, use_reentrant=False, context_fn=policy, early_stop=False).sum().backward()
    assert len(ran) == (1 if registered else 2)
    torch.testing.assert_close(x.grad, (2 * x).cos().detach() * 2)


def test_a_new_heavy_operation_is_found(twice):
    """The check of the model suite, on blocks with an operation that nobody listed."""
    op, apply, _ = twice
    model = on_cpu(Toy.Config())
    checkpoint_blocks(model, "none")
    tokens_BL = torch.arange(12).view(2, 6)
    found = heavy_ops(lambda: model(tokens_BL))
    assert found == {aten.mm.default, aten._scaled_dot_product_flash_attention_for_cpu.default}
    assert found <= saved_ops()
    block = model.layers["0"]
    plain = block.feed_forward.forward
    block.feed_forward.forward = lambda x_BLD: apply(plain(x_BLD))
    assert heavy_ops(lambda: model(tokens_BL)) - saved_ops() == {op}
    block.feed_forward.forward = lambda x_BLD: torch.baddbmm(x_BLD, x_BLD[:, :, :6], x_BLD)
    assert heavy_ops(lambda: model(tokens_BL)) - saved_ops() == {aten.baddbmm.default}
    save_output(op)
    block.feed_forward.forward = lambda x_BLD: apply(plain(x_BLD))
    assert heavy_ops(lambda: model(tokens_BL)) <= saved_ops()
