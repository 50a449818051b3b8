"""Exceptions to the policy, stated in a module: what they do in eager mode and in a compiled graph."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from torch.utils.flop_counter import FlopCounterMode

from core.activation_checkpoint.policy import default_activation_checkpoint_policy
from core.activation_checkpoint.region import current_mark, is_recomputing, kept, off_the_record, recomputed

MODES = ["selective", "full"]
UNIT = 2 * 8**3
"""FLOPs of a product of two matrices of eight by eight."""


def under_policy(function, mode, **settings):
    policy = default_activation_checkpoint_policy(mode=mode)
    return lambda *args: checkpoint(function, *args, use_reentrant=False, early_stop=False, context_fn=policy)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.fixture
def forget_graphs():
    yield
    torch._dynamo.reset()


def test_the_innermost_mark_counts():
    assert current_mark() is None
    with kept():
        assert current_mark() == "keep"
        with recomputed():
            assert current_mark() == "recompute"
            with kept():
                assert current_mark() == "keep"
        assert current_mark() == "keep"
    with pytest.raises(KeyError), recomputed():
        raise KeyError
    assert current_mark() is None


def plain(x, w):
    return ((((x @ w).sigmoid() @ w).exp() @ w).tanh() @ w).sin()


def nested(x, w):
    """`plain`, with one product to recompute inside a stretch to keep."""
    with kept():
        a = (x @ w).sigmoid()
        with recomputed():
            b = (a @ w).exp()
        c = (b @ w).tanh()
    return (c @ w).sin()


@pytest.mark.parametrize("compile_", [False, True], ids=["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("function", "mode", "units"),
    [
        (plain, "full", 12),  # four products forward, two for each in backward, and all four again
        (plain, "selective", 10),  # the second and the fourth again
        (nested, "full", 10),  # the two outside kept()
        (nested, "selective", 9),  # the marked one alone: the last is the first that is counted
    ],
)
def test_marks_work_nested_and_compiled(forget_graphs, function, mode, units, compile_):
    torch.manual_seed(0)
    x, w = torch.randn(8, 8, requires_grad=True), (torch.randn(8, 8) / 3).requires_grad_()
    expected = torch.autograd.grad(plain(x, w).sum(), (x, w))
    run = under_policy(function, mode)
    if compile_:
        y = compiled(run)(x, w)
    else:
        with FlopCounterMode(display=False):
            y = run(x, w)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == units * UNIT
    for found, gradient in zip((x.grad, w.grad), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5 if compile_ else 0, atol=1e-6 if compile_ else 0)


class Routed(nn.Module):
    """Sends each token to the one of two experts that it scores highest; the second time the scores have a flaw."""

    def __init__(self, flaw: float, *, cured: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(4, 2, bias=False)
        self.expert_ED = nn.Parameter(torch.randn(2, 4))
        self.error_E, self.other_error_E = torch.tensor([flaw, -flaw]), torch.tensor([-flaw, flaw])
        self.cured = cured

    def forward(self, x_TD):
        error_E = self.other_error_E if is_recomputing() else self.error_E
        if self.cured:
            with kept():
                score_T, index_T = self.route(x_TD, error_E)
        else:
            score_T, index_T = self.route(x_TD, error_E)
        return (x_TD * self.expert_ED[index_T]).tanh() * score_T[:, None]

    def route(self, x_TD, error_E):
        score_TE = (self.gate(x_TD) + error_E).softmax(-1)
        top = score_TE.topk(1)
        return top.values[:, 0], top.indices[:, 0]


def routed_gradients(flaw, mode, *, cured):
    layer = Routed(flaw, cured=cured)
    run = layer if mode == "none" else under_policy(layer, mode)
    x_TD = torch.linspace(-2, 2, 24).view(6, 4).requires_grad_()
    run(x_TD).sum().backward()
    return [x_TD.grad, *(weight.grad for weight in layer.parameters())]


@pytest.mark.parametrize("mode", MODES)
def test_a_changed_route_needs_kept(mode):
    expected = routed_gradients(0.5, "none", cured=False)
    for found, gradient in zip(routed_gradients(0.5, mode, cured=True), expected, strict=True):
        assert torch.equal(found, gradient)
    wrong = routed_gradients(0.5, mode, cured=False)  # and nothing is said
    assert max((found - gradient).abs().max() for found, gradient in zip(wrong, expected, strict=True)) > 0.05
    assert all(map(torch.equal, routed_gradients(0.0, mode, cured=False), routed_gradients(0.0, "none", cured=True)))


class Counting(nn.Module):
    """Counts its calls in a buffer, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.w = nn.Linear(4, 4)
        self.register_buffer("n", torch.zeros(()))
        self.way = way

    def forward(self, x):
        match self.way:
            case "plain":
                self.n.add_(1)
            case "off the record":
                with off_the_record():
                    self.n.add_(1)
            case "once":
                with off_the_record():
                    if not is_recomputing():
                        self.n.add_(1)
            case "on the record":
                if not is_recomputing():
                    self.n.add_(1)
        return self.w(x).relu()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("way", "count"), [("plain", 2), ("off the record", 2), ("once", 1)])
def test_a_counter_counts_once(mode, way, count):
    layer = Counting(way)
    for calls in (1, 2):
        under_policy(layer, mode)(torch.randn(2, 4)).sum().backward()
        assert layer.n == count * calls
    with torch.no_grad():
        layer(torch.randn(2, 4))
    assert layer.n == count * 2 + 1


@pytest.mark.parametrize("mode", MODES)
def test_a_counter_that_is_left_out_must_be_off_the_record(mode):
    y = under_policy(Counting("on the record"), mode)(torch.randn(2, 4))
    with pytest.raises(CheckpointError, match=r"aten.add_.*off_the_record\(\).*if not is_recomputing\(\)"):
        y.sum().backward()
    assert not is_recomputing()


def test_a_counter_counts_once_when_compiled(forget_graphs):
    layer = Counting("once")
    run = compiled(under_policy(layer, "selective"))
    for calls in (1, 2):
        run(torch.randn(2, 4)).sum().backward()
        assert layer.n == calls


def test_recomputing_is_true_in_the_repetition_alone():
    seen = []

    def function(x):
        seen.append(is_recomputing())
        return x.sin()

    x = torch.randn(3, requires_grad=True)
    y = under_policy(function, "full")(x)
    assert not is_recomputing()
    y.sum().backward()
    assert seen == [False, True] and not is_recomputing()


def test_off_the_record_ends_with_an_error_too():
    x = torch.randn(3, requires_grad=True)

    def function(x):
        try:
            with off_the_record():
                x.detach().cos()
                raise KeyError
        except KeyError:
            return x.sin()

    under_policy(function, "full")(x).sum().backward()
    assert torch.equal(x.grad, x.detach().cos())
