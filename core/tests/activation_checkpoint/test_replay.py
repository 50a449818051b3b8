"""The repetition of a block under guard: it must do what the forward did, or say what it did otherwise."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointError,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from core.activation_checkpoint.policy import default_activation_checkpoint_policy
from core.activation_checkpoint.region import is_recomputing, kept, off_the_record
from core.activation_checkpoint.replay import MODULES, SAVED, name_modules
from core.config.errors import UserError

MODES = ["selective", "full"]


def run(function, *args, mode="selective", debug=False, early_stop=False):
    policy = default_activation_checkpoint_policy(mode=mode, debug=debug)
    return checkpoint(function, *args, use_reentrant=False, context_fn=policy, early_stop=early_stop)


class Cached(nn.Module):
    """A linear layer between two others that on its first call works out a matrix, and then has it."""

    def __init__(self, *, guarded: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = (nn.Linear(4, 4, bias=False) for _ in range(2))
        self.table = Table(guarded)

    def forward(self, x):
        return self.last(self.table(self.first(x).relu()))


class Table(nn.Module):
    def __init__(self, guarded: bool) -> None:
        super().__init__()
        self.guarded, self.matrix = guarded, None

    def forward(self, x):
        if self.matrix is None:
            if self.guarded:
                with off_the_record(), torch.no_grad():
                    self.matrix = self.make(x)
            else:
                with torch.no_grad():
                    self.matrix = self.make(x)
        return x.sin() @ self.matrix

    def make(self, x):
        return torch.eye(4) @ torch.arange(16.0).view(4, 4)


def gradients(layer, x, call):
    layer.zero_grad()
    call(layer, x).sum().backward()
    return [weight.grad for weight in layer.parameters()]


X = torch.linspace(-1, 1, 16).view(4, 4)


def expected_gradients():
    return gradients(Cached(), X, lambda layer, x: layer(x))


def test_one_time_work_is_silently_wrong_without_the_guard():
    """What the guard is for: PyTorch's own modes give the last product the output of another one."""

    def policy(context, op, *args, **kwargs):
        save = op is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    context_fn = partial(create_selective_checkpoint_contexts, policy)
    layer = Cached()
    layer.inner = layer.last
    layer.last = nn.Sequential(layer.inner, nn.Tanh())
    twin = Cached()
    twin.inner = twin.last
    twin.last = nn.Sequential(twin.inner, nn.Tanh())
    wrong = gradients(layer, X, lambda layer, x: checkpoint(layer, x, use_reentrant=False, context_fn=context_fn))
    right = gradients(twin, X, lambda layer, x: layer(x))
    worst = max((a - b).abs().max() / b.abs().max() for a, b in zip(wrong, right, strict=True))
    assert worst > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_one_time_work_is_named(mode):
    y = run(Cached(), X, mode=mode)
    with pytest.raises(CheckpointError) as caught:
        y.sum().backward()
    text = str(caught.value)
    for part in ("was aten.eye", "is aten.sin.default in its recomputation", "debug names the module", "off_the_rec"):
        assert part in text


@pytest.mark.parametrize("mode", MODES)
def test_debug_names_the_module_of_one_time_work(mode):
    layer = Cached()
    name_modules(layer, "layers.7")
    y = run(layer, X, mode=mode, debug=True)
    with pytest.raises(CheckpointError, match="in forward in layers.7.table, and is aten.sin"):
        y.sum().backward()
    assert not MODULES


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("warm", [False, True])
def test_one_time_work_off_the_record_is_right(mode, warm):
    layer = Cached(guarded=not warm)
    if warm:  # done before training
        layer(X)
    for found, expected in zip(gradients(layer, X, partial(run, mode=mode)), expected_gradients(), strict=True):
        assert torch.equal(found, expected)


def test_work_only_in_the_repetition_is_named():
    def function(x):
        y = x.sin()
        return (y.exp() if is_recomputing() else y).cos()

    with pytest.raises(CheckpointError, match="operation 2 of a block was aten.cos.default .* is aten.exp.default"):
        run(function, X.clone().requires_grad_()).sum().backward()

    def longer(x):
        y = x.sin().cos()
        return y.exp() if is_recomputing() else y

    with pytest.raises(CheckpointError, match="recomputation does aten.exp.default after the end of its forward"):
        run(longer, X.clone().requires_grad_()).sum().backward()


def test_work_missing_at_the_end_is_named():
    def function(x):
        y = x.sin()
        if not is_recomputing():
            y.detach().abs()
        return y

    with pytest.raises(CheckpointError, match="ended before operation 2, aten.abs.default"):
        run(function, X.clone().requires_grad_()).sum().backward()


def test_stopping_early_is_no_missing_work():
    layer = Cached(guarded=True)
    found = gradients(layer, X, partial(run, mode="full", early_stop=True))
    assert all(map(torch.equal, found, expected_gradients()))


def test_backward_twice():
    x = X.clone().requires_grad_()
    y = run(torch.sin, x, mode="full").sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(y, x))
    y = run(lambda x: (x @ x.T).sin(), x).sum()
    torch.autograd.grad(y, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="backward went a second time"):
        torch.autograd.grad(y, x)


def test_what_full_keeps_is_there_for_a_second_pass_of_backward():
    def function(x: torch.Tensor) -> torch.Tensor:
        with kept():
            order = x[:, 0].argsort()
        return x[order].flatten().sin() * order.repeat_interleave(x.shape[1])

    x = X.clone().requires_grad_()
    y = run(function, x, mode="full").sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(y, x))
    assert torch.equal(*first, *torch.autograd.grad(function(x).sum(), x))


def test_a_saved_output_that_is_changed_in_place_is_an_error():
    x = X.clone().requires_grad_()
    y = run(lambda x: (x @ x).add_(1).sin(), x).sum()
    with pytest.raises(UserError, match=r"mutated.*: the output of aten\.mm\.default \(--activ.*changed in place"):
        y.backward()
    run(lambda x: (x @ x).add_(1).sin(), x, mode="full").sum().backward()
    again = X.clone().requires_grad_()
    (again @ again).add_(1).sin().sum().backward()
    assert torch.equal(x.grad, again.grad)


def test_what_hooks_and_profilers_do_is_not_compared():
    def function(x):
        if is_recomputing():
            return x.sin()
        with torch.profiler.record_function("forward"):
            return x.sin()

    x = X.clone().requires_grad_()
    run(function, x).sum().backward()
    assert torch.equal(x.grad, X.cos())


def test_higher_order_operations_pass_through():
    """PyTorch registers them for its own modes by class; ours must take them too."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    q = torch.randn(1, 2, 16, 16)
    SAVED.clear()
    forward, repetition = default_activation_checkpoint_policy(debug=True)()
    try:
        with forward:
            out = flex_attention(q, q, q)
        with repetition:
            again = flex_attention(q, q, q)
    finally:
        torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = False
    assert torch.equal(out, again)
    assert SAVED[torch.ops.higher_order.flex_attention] == 1
    SAVED.clear()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks its input
def test_a_compiled_function_inside_an_eager_block():
    """Its first call traces and compiles, which must not be taken for work of the block."""
    torch._dynamo.reset()
    inner = torch.compile(lambda x: x.sin() @ x.cos().T, backend="aot_eager")
    x = X.clone().requires_grad_()
    for mode in ("selective", "full", "full"):
        found = torch.autograd.grad(run(lambda x: inner(x.exp()).tanh(), x, mode=mode).sum(), x)
        y = x.exp()
        expected = torch.autograd.grad((y.sin() @ y.cos().T).tanh().sum(), x)
        torch.testing.assert_close(found, expected)
    torch._dynamo.reset()


def test_module_names_survive_an_error():
    layer = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    layer[1].forward = lambda x: 1 / 0
    name_modules(layer, "layers.0")
    with pytest.raises(ZeroDivisionError):
        layer(X)
    assert not MODULES
