"""Losses written once, outside of core, cost the same on one rank and in every layout."""

import inspect
import math
from pathlib import Path

import pytest
import torch
from losses_of_a_user import Focal, Smoothed, ZLoss
from torch import Tensor

from core.data.packing import IGNORE
from core.nn.layers import Head
from core.parallel.settings import Parallelism
from core.parallel.vocabulary import WholeVocabulary
from core.step.loss import CrossEntropy, Loss, loss_backend
from core.step.settings import Compile
from core.testing.parity import Case, StepResult, alone, largest_differences, result_of
from core.testing.ranks import run_ranks
from core.testing.toy import Toy

LOSSES = {"cross entropy": CrossEntropy, "z": ZLoss, "focal": Focal, "smoothed": Smoothed}
LAYOUTS = {
    "fsdp2": Parallelism(),
    "tp2": Parallelism(tensor_parallel_degree=2),
    "cp2": Parallelism(context_parallel_degree=2),
    "pp2": Parallelism(pipeline_parallel_degree=2),
    "pp2-interleaved": Parallelism(
        pipeline_parallel_degree=2, pipeline_parallel_schedule="Interleaved1F1B", pipeline_parallel_layers_per_stage=1
    ),
}


def by_hand(name: str, row: list[float], label: int) -> float:
    """What one token costs, in double precision."""
    z = math.log(math.fsum(math.exp(value) for value in row))
    log_p = row[label] - z
    return {
        "cross entropy": -log_p,
        "z": -log_p + 0.1 * z**2,
        "focal": -((1 - math.exp(log_p)) ** 2) * log_p,
        "smoothed": -0.9 * log_p - 0.1 * math.fsum(value - z for value in row) / len(row),
    }[name]


def drawn() -> tuple[Head, Tensor, Tensor]:
    """A head of 31 words, a residual stream and labels, of which some do not count: all of the first row."""
    generator = torch.Generator().manual_seed(1)
    head = Head(8, 31, std=1.0)
    head.weight.data = torch.randn(31, 8, generator=generator)
    x_BLD = torch.randn(3, 5, 8, generator=generator)
    labels_BL = torch.randint(31, (3, 5), generator=generator)
    labels_BL[0] = labels_BL[1, 2] = IGNORE
    return head, x_BLD, labels_BL


@pytest.mark.parametrize("name", LOSSES)
def test_loss_equals_a_loop(name: str) -> None:
    head, x_BLD, labels_BL = drawn()
    loss: Loss = LOSSES[name].Config().build()
    found = loss(x_BLD, labels_BL, head, WholeVocabulary(31))
    logits = (x_BLD.double() @ head.weight.double().T).tolist()
    expected = math.fsum(
        by_hand(name, logits[b][i], label)
        for b, row in enumerate(labels_BL.tolist())
        for i, label in enumerate(row)
        if label != IGNORE
    )
    assert found.item() == pytest.approx(expected, rel=1e-6) and found.dtype == torch.float32
    assert loss(x_BLD, torch.full_like(labels_BL, IGNORE), head, WholeVocabulary(31)).item() == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_equals_that_of_a_loop(name: str) -> None:
    head, x_BLD, labels_BL = drawn()
    LOSSES[name].Config().build()(x_BLD.requires_grad_(), labels_BL, head, WholeVocabulary(31)).backward()
    exact = x_BLD.detach().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    z_BL = (exact @ weight.T).logsumexp(-1)
    logits = exact @ weight.T
    log_p_BL = logits.gather(-1, labels_BL.clamp(min=0).unsqueeze(-1)).squeeze(-1) - z_BL
    each_BL = {
        "cross entropy": -log_p_BL,
        "z": -log_p_BL + 0.1 * z_BL**2,
        "focal": -((1 - log_p_BL.exp()) ** 2) * log_p_BL,
        "smoothed": -0.9 * log_p_BL - 0.1 * (logits - z_BL.unsqueeze(-1)).mean(-1),
    }[name]
    each_BL[labels_BL != IGNORE].sum().backward()
    torch.testing.assert_close(x_BLD.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-5)


def results_of(cases: list[Case]) -> list[StepResult]:
    return [result_of(case) for case in cases]


@pytest.mark.layout
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_equal_one_rank(layout: str) -> None:
    """61 words are no multiple of two ranks, nor do chunks of 10 divide the tokens; the parts of multi-token prediction
    go through the loss, too."""
    n_mtp = 0 if layout.startswith(("pp", "cp")) else 1
    model = Toy.Config(vocab_size=61, n_layers=4, n_mtp_layers=n_mtp)
    settings = CrossEntropy.Config(chunk_tokens=10, z_loss=0.01, label_smoothing=0.1, soft_cap=15.0)
    losses = [settings, *(LOSSES[name].Config(chunk_tokens=10) for name in ("z", "focal", "smoothed"))]
    cases = [Case(model, LAYOUTS[layout], loss=loss, world_size=2, local_batch_size=2) for loss in losses]
    for case, *found in zip(cases, *run_ranks(results_of, 2, cases), strict=True):
        worst = largest_differences(found, result_of(alone(case)))
        assert worst["loss"] < 1e-6 and worst["gradient"] < 1e-5 and worst["next loss"] < 1e-5, case.loss


def test_the_document_has_the_loss_that_is_tested() -> None:
    text = (Path(__file__).parents[3] / "docs/add-a-loss.md").read_text(encoding="utf-8")
    assert inspect.getsource(Focal) in text


def compiled_calls(case: Case) -> tuple[float, int]:
    """The loss of a step, and how often a compiled loss was asked for."""
    calls = 0

    def counting(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        nonlocal calls
        calls += 1
        return graph

    compiled = case.loss.build(compile_backend=counting)
    case.loss = type("Compiled", (), {"build": lambda _: compiled})()
    return result_of(case).loss, calls


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks the input
def test_a_compiled_loss_is_used_under_tensor_parallelism() -> None:
    case = Case(Toy.Config(vocab_size=61), LAYOUTS["tp2"], loss=ZLoss.Config(), world_size=2)
    plain = run_ranks(result_of, 2, case)[0].loss
    for loss, calls in run_ranks(compiled_calls, 2, case):
        assert calls > 0 and loss == pytest.approx(plain, rel=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks the input
def test_a_compiled_loss_takes_chunks_of_any_length() -> None:
    """The last chunk of a step is as long as its labels leave it: it is no reason to compile again."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    head, x_BLD = Head(8, 61, std=0.02), torch.randn(1, 25, 8, requires_grad=True)
    torch.nn.init.normal_(head.weight)
    labels_BL = torch.arange(25)[None]
    compiled, plain = (CrossEntropy.Config(chunk_tokens=10).build(compile_backend=each) for each in (backend, None))
    for n in (25, 23):
        labels_BL[:, n:] = IGNORE
        found, expected = (loss(x_BLD, labels_BL, head, WholeVocabulary(61), n_labels=n) for loss in (compiled, plain))
        torch.testing.assert_close(found, expected)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_a_written_out_loss_is_not_compiled_for_a_cpu() -> None:
    """Whoever computes tokens in another way is compiled everywhere, and on a GPU everything is."""
    on, off, cpu, gpu = Compile(enable=True, backend="eager"), Compile(), torch.device("cpu"), torch.device("cuda")
    assert loss_backend(on, CrossEntropy.Config(z_loss=0.1), cpu) is None
    assert loss_backend(on, ZLoss.Config(), cpu) == "eager"
    assert [loss_backend(on, each, gpu) for each in (CrossEntropy.Config(), ZLoss.Config())] == ["eager"] * 2
    for settings in (off, Compile(enable=True, components=["model"])):
        assert loss_backend(settings, ZLoss.Config(), gpu) is None
