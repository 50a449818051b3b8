"""A step's graph: equal to eager bit for bit, with core's save set; on ranks equal to FSDP2; its passes and its run."""

import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.fx.traceback import annotate
from torch.utils._python_dispatch import TorchDispatchMode

from core.activation_checkpoint.apply import ActivationCheckpoint
from core.activation_checkpoint.meter import Meter
from core.activation_checkpoint.policy import Policy, default_activation_checkpoint_policy, weight_shape
from core.activation_checkpoint.replay import Replay
from core.checkpoint.settings import Checkpoint
from core.config import cli
from core.config.errors import UserError
from core.config.recipe import recipes
from core.config.record import diff, from_json, to_json
from core.config.validate import validate
from core.data.packing import Batch
from core.nn.balance import start_step
from core.nn.decoder import Decoder
from core.parallel.fake import fake_ranks
from core.parallel.settings import Parallelism
from core.step.loss import CrossEntropy
from core.step.objective import Objective
from core.step.source_losses import Tally
from core.step.update import StepInfo
from core.testing.parity import Case, StepResult, batches_of, largest_differences, result_of, step_result
from core.testing.ranks import run_ranks
from core.testing.toy import Toy, ToyMoE
from core.train.trainer import Trainer
from deepseek_v3.configs import deepseek_v3_debug
from gpt_oss.configs import gpt_oss_debug
from graph_trainer import configs, save_set
from graph_trainer.collectives import GATHER_OP, is_of_weight
from graph_trainer.compiled import of_block, split_by_block
from graph_trainer.memory import GraphSize
from graph_trainer.passes import prepare
from graph_trainer.save_set import Decision, recompute, tag
from graph_trainer.settings import GraphCompile
from graph_trainer.steps import built_for_graphs, drop_policy, graph_step
from graph_trainer.trace import BLOCK, backward_phase, is_backward, trace
from graph_trainer.trainer import GraphTrainer
from llama3.configs import llama3_debug
from qwen3 import configs as qwen3_configs
from qwen3.configs import qwen3_debug, qwen3_moe_debug

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),  # as Inductor is imported
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),  # dynamo does, torch 2.13
]
EVERY_PASS = ["dead_code", "save_set", "offload", "merge_collectives", "prefetch"]
MODES = ("none", "selective", "full")
FAMILIES = {
    "llama3": ("llama3", "debug", None),
    "qwen3": ("qwen3", "debug", None),
    "gpt_oss": ("gpt_oss", "debug", None),
    "deepseek_v3": ("deepseek_v3", "debug", None),
    "qwen3_moe": ("qwen3", "moe_debug", None),
    "llama3_tied": ("llama3", "debug", True),
    "qwen3_untied": ("qwen3", "debug", False),
    "deepseek_v3_mtp": ("deepseek_v3", "debug", None),
}


def small(family: str) -> Decoder.Config:
    """Two blocks of a family, its debug model's widths."""
    package, size, tied = FAMILIES[family]
    config = import_module(f"{package}.model").size(size)
    config.n_layers, config.vocab_size, config.n_mtp_layers = 2, 128, int(family.endswith("mtp"))
    config.tie_embeddings = config.tie_embeddings if tied is None else tied
    return config


def with_all_labels(batch: Batch) -> Batch:
    """The batch with a label everywhere: eager leaves tokens without one out of the head's product."""
    return batch._replace(labels_BL=batch.labels_BL.clamp(min=0))


def noted(policy: Policy, found: list[Decision]) -> Replay:
    """The policy's modes, the forward one noting what it decides."""
    forward, again = policy()
    decide = forward.policy_fn

    def note(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        decision = decide(context, op, *args, **kwargs)
        found.append(Decision(str(op), weight_shape(op, args), decision.name == "MUST_SAVE"))
        return decision

    forward.policy_fn = note
    return forward, again


def eager_decisions(model: Decoder, mode: str, run: Callable[[], Any]) -> dict[str, list[Decision]]:
    """What the policy of each block says while `run` trains eagerly."""
    found: dict[str, list[Decision]] = {number: [] for number in model.layers}
    ActivationCheckpoint.Config(mode=mode).build(folder=Path()).apply(model)  # pyrefly: ignore[bad-argument-type]
    for number, block in model.layers.items():
        inner, settings = block.forward.args
        settings = settings | {"context_fn": partial(noted, settings["context_fn"], found[number])}
        block.forward = partial(block.forward.func, inner, settings)
    run()
    for block in model.layers.values():
        del block.forward
    return found


def saved_and_products(decisions: dict[str, list[Decision]]) -> dict[str, Any]:
    """By block: the matrix products in their order, and how often each operation is saved."""
    return {
        number: ([each for each in found if each.shape], Counter(each.op for each in found if each.saved))
        for number, found in decisions.items()
    }


def check_family(family: str, mask: Literal["causal", "document"], compute_dtype: torch.dtype = torch.float32) -> None:
    """In every mode a graph has eager's losses, gradients and buffers, bit for bit, and eager's save set."""
    case = Case(small(family), n_rows=4, length=32, mask=mask, loss=CrossEntropy.Config(), compute_dtype=compute_dtype)
    built, objective = built_for_graphs(case, GraphCompile())
    (model,) = built.models
    (batch,) = map(with_all_labels, batches_of(case, objective.layout))
    n_valid = float(batch.labels_BL.numel())
    settings = {"layout": objective.layout, "dtype": case.compute_dtype, "mask": mask}
    eager = Objective(built.models, case.loss.build(), **settings)

    tally = Tally(torch.arange(case.n_rows) % 2, torch.zeros(2))

    def train() -> tuple[tuple[float, float], dict[str, Tensor]]:
        model.zero_grad()
        tally.nats_S.zero_()
        start_step(model, n_valid)
        losses = eager.accumulate([batch], n_valid, [tally])
        found = {name: weight.grad for name, weight in model.named_parameters()}
        return losses, {name: gradient.clone() for name, gradient in found.items() if gradient is not None}

    losses, gradients = train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()} | {"tally": tally.nats_S.clone()}
    microbatch = objective.layout.to_rank_tokens(batch, documents=mask == "document")
    inputs = objective.inputs(microbatch, n_valid, tally)
    traced = objective.trace(microbatch, tally, inputs)
    kept = {}
    for mode in MODES:
        expected = {} if mode == "none" else eager_decisions(model, mode, train)
        policies = ActivationCheckpoint.Config(mode=mode).build(folder=Path()).policies(model)
        prepared = prepare(deepcopy(traced), GraphCompile(passes=EVERY_PASS), policies, list(gradients), let_go=False)
        assert saved_and_products(prepared.given.decided or {}) == saved_and_products(expected)
        tally.nats_S.zero_()
        start_step(model, n_valid)
        with torch.no_grad():
            main, total, *found = prepared.call(*inputs)
        assert (main.item(), total.item()) == losses
        for (name, gradient), own in zip(gradients.items(), found, strict=True):
            assert gradient.any() and torch.equal(gradient, own), f"{mode}: {name}"
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
        assert torch.equal(tally.nats_S, buffers["tally"])
        kept[mode] = prepared.sizes["save_set"][1].kept
        assert prepared.sizes["offload"][1].on_host > 0
    assert kept["full"] < kept["selective"] < kept["none"]


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gpt_oss", "deepseek_v3"])
def test_a_graph_is_eager_bit_for_bit_and_saves_what_eager_saves(family: str) -> None:
    check_family(family, "document")


class CountedProducts(TorchDispatchMode):
    """Counts the products by weights that are computed, by operation and shape: what a policy hands back is none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, Any]] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if shape := weight_shape(op, args):
            self.found[str(op), shape] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gpt_oss", "deepseek_v3"])
def test_a_graph_computes_the_products_of_an_eager_step(family: str) -> None:
    """One that ends a block's second forward with the last of what backward reads, as a graph does."""
    case = Case(small(family), n_rows=4, length=32, loss=CrossEntropy.Config())
    built, objective = built_for_graphs(case, GraphCompile())
    (model,) = built.models
    (batch,) = map(with_all_labels, batches_of(case, objective.layout))
    n_valid = float(batch.labels_BL.numel())
    microbatch = objective.layout.to_rank_tokens(batch, documents=False)
    inputs = objective.inputs(microbatch, n_valid, None)
    traced = objective.trace(microbatch, None, inputs)
    eager = Objective(built.models, case.loss.build(), layout=objective.layout, dtype=case.compute_dtype, mask="causal")
    n_products = {}
    for mode in MODES:
        policies = ActivationCheckpoint.Config(mode=mode).build(folder=Path()).policies(model)
        prepared = prepare(deepcopy(traced), GraphCompile(), policies, [], let_go=False)
        start_step(model, n_valid)
        with CountedProducts() as in_graph, torch.no_grad():
            prepared.call(*inputs)
        ActivationCheckpoint.Config(mode=mode, early_stop=True).build(folder=Path()).apply(model)
        start_step(model, n_valid)
        with CountedProducts() as in_eager:
            eager.accumulate([batch], n_valid, [None])
        for block in model.layers.values():
            vars(block).pop("forward", None)
        assert in_graph.found == in_eager.found, mode
        n_products[mode] = in_graph.found.total()
    assert n_products["none"] < n_products["selective"] < n_products["full"]


@pytest.mark.matrix
@pytest.mark.parametrize("mask", ["causal", "document"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_graph_is_eager_bit_for_bit(family: str, mask: Literal["causal", "document"]) -> None:
    check_family(family, mask)


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_holds_what_it_is_said_to_hold(mode: str) -> None:
    """The peak that the log and a dry run tell, against the bytes of tensors that live as the graph runs."""
    case = Case(ToyMoE.Config(), n_rows=4, length=32, checkpoint=mode)  # pyrefly: ignore[bad-argument-type]
    built, objective = built_for_graphs(case, GraphCompile())
    (batch,) = batches_of(case, objective.layout)
    microbatch = objective.layout.to_rank_tokens(batch, documents=True)
    inputs = objective.inputs(microbatch, 100.0, None)
    start_step(built.models[0], 100.0)
    objective.run(microbatch, 100.0)
    (prepared,) = objective.prepared.values()
    with torch.no_grad(), Meter() as meter:
        prepared.call(*(each.detach() for each in inputs))
    assert meter.peak == pytest.approx(prepared.sizes["save_set"][1].peak, rel=0.01)


@pytest.mark.matrix
@pytest.mark.parametrize("family", ["llama3", "qwen3", "gpt_oss", "deepseek_v3"])
def test_a_graph_in_16_bits_is_eager_bit_for_bit(family: str) -> None:
    check_family(family, "document", torch.bfloat16)


def test_microbatches_of_two_kinds_have_a_graph_each() -> None:
    """Of four the last has padding, and sees no more than the others do."""
    case = Case(ToyMoE.Config(), n_rows=8, local_batch_size=2, checkpoint="selective")
    built, objective = built_for_graphs(case, GraphCompile())
    worst = largest_differences([step_result(case, built, objective)], result_of(case))
    assert max(worst.values()) < 1e-6, worst
    assert len(objective.prepared) == 2


def writing(tensors: list[Tensor]) -> list[Tensor | None]:
    """A block whose result is written to before it is read."""
    x, weight = tensors
    with annotate({BLOCK: "0"}):
        h = x @ weight
        h = h * 2
        h[:, :1] = weight[:1, :1] * 3
        y = h.sin().sin()
    return losses_and_gradients(y, weight)


def read_before_a_write(tensors: list[Tensor]) -> list[Tensor | None]:
    """A block that reads a buffer, which another operation writes to afterwards."""
    x, weight, buffer = tensors
    with annotate({BLOCK: "0"}):
        y = (x @ weight + buffer).sin().sin()
        buffer.add_(1.0)
    return losses_and_gradients(y, weight)


def losses_and_gradients(y: Tensor, weight: Tensor) -> list[Tensor | None]:
    loss = y.square().sum()
    with backward_phase(loss):
        return [loss.detach(), *torch.autograd.grad(loss, [weight])]


@pytest.mark.parametrize("step", [writing, read_before_a_write])
def test_what_is_written_to_is_saved(step: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def inputs() -> list[Tensor]:
        x, weight = (torch.randn(4, 4, generator=generator.manual_seed(i)) for i in range(2))
        return [x, weight.requires_grad_(), torch.full((4,), 2.0)][: 2 + (step is read_before_a_write)]

    _, expected = step(inputs())
    policies = {"0": default_activation_checkpoint_policy(mode="full")}

    def gradient() -> Tensor:
        module = trace(step, inputs())
        tag(module.graph, policies, let_go=False)
        assert recompute(module) > 0
        with torch.no_grad():
            return module(*inputs())[1]

    assert torch.equal(gradient(), expected)
    monkeypatch.setattr(save_set, "last_writes", lambda nodes: {})
    assert not torch.allclose(gradient(), expected, rtol=0.01), "the rule has nothing to do"


def drawing(tensors: list[Tensor]) -> list[Tensor | None]:
    """A block that multiplies by random numbers."""
    x, weight = tensors
    with annotate({BLOCK: "0"}):
        h = x @ weight
        y = (h * torch.rand_like(h)).sin().sin()
    return losses_and_gradients(y, weight)


def test_random_numbers_are_drawn_once() -> None:
    inputs = [torch.ones(4, 4), torch.ones(4, 4, requires_grad=True)]
    module = trace(drawing, inputs)
    tag(module.graph, {"0": default_activation_checkpoint_policy(mode="full")}, let_go=False)
    assert recompute(module) > 0
    found = []
    for step in (drawing, module):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found.append(step(inputs)[1] if step is drawing else module(*(each.detach() for each in inputs))[1])
    assert torch.equal(*found)


def test_backward_belongs_to_the_block_whose_gradient_it_computes() -> None:
    case = Case(Toy.Config(), n_rows=2, length=16)
    built, objective = built_for_graphs(case, GraphCompile())
    (batch,) = batches_of(case, objective.layout)
    microbatch = objective.layout.to_rank_tokens(batch, documents=True)
    module = objective.trace(microbatch, None, objective.inputs(microbatch, 32.0, None))
    products = module.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    counts = Counter((node.meta[BLOCK], is_backward(node)) for node in products)
    blocks = list(built.models[0].layers)
    for block in blocks:
        assert counts[block, True] == 2 * counts[block, False] > 0
    parts = [part for part in split_by_block(module).children() if isinstance(part, GraphModule) and of_block(part)]
    assert len(parts) == 2 * len(blocks), "forward and backward of each"


LAYOUTS = {"fsdp": Parallelism(), "tensor": Parallelism(tensor_parallel_degree=2)}


def cases_of(layout: str, world_size: int, mode: Any) -> list[Case]:
    """Models in a mode, one of them sparse and one with tied weights."""
    models = (Toy.Config(), ToyMoE.Config(), Toy.Config(tie_embeddings=True))
    settings: dict[str, Any] = {"world_size": world_size, "n_rows": 8, "length": 16, "checkpoint": mode}
    return [Case(model, LAYOUTS[layout], **settings) for model in models]


def simple_and_fsdp2(cases: list[Case]) -> list[tuple[StepResult, StepResult, dict[str, tuple[GraphSize, GraphSize]]]]:
    """Of each case a step by a graph with simple FSDP, one by FSDP2, and what the passes did."""
    found = []
    for case in cases:
        step = graph_step(case, GraphCompile(passes=EVERY_PASS))
        drop_policy(step.prepared)
        found.append((step.result, result_of(case), step.prepared.sizes))
    return found


def check_ranks(cases: list[Case], world_size: int) -> list[dict[str, tuple[GraphSize, GraphSize]]]:
    """A step by simple FSDP is one by FSDP2, to 1e-6, on every rank; returns what the passes did on the first."""
    ranks = run_ranks(simple_and_fsdp2, world_size, cases, timeout_s=300)
    for rank in ranks:
        for case, (simple, fsdp2, _) in zip(cases, rank, strict=True):
            worst = largest_differences([simple], fsdp2)
            assert max(worst.values()) < 1e-6, f"{case.checkpoint}: {worst}"
    return [sizes for _, _, sizes in ranks[0]]


@pytest.mark.layout
def test_simple_fsdp_equals_fsdp2_on_two_ranks() -> None:
    for sizes in check_ranks([cases_of("fsdp", 2, "selective")[1], cases_of("fsdp", 2, "full")[2]], 2):
        before, after = sizes["merge_collectives"]
        assert before.sent == after.sent
        assert (after.calls["all-gather"], after.calls["reduce-scatter"]) <= (6, 6) < (25, 25)
        assert before.calls["reduce-scatter"] >= 25 and before.calls["all-gather"] > before.calls["reduce-scatter"]


@pytest.mark.matrix
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_simple_fsdp_equals_fsdp2(mode: str, layout: str, world_size: int) -> None:
    check_ranks(cases_of(layout, world_size, mode), world_size)


@pytest.mark.matrix
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama3", "qwen3", "gpt_oss", "deepseek_v3"])
def test_simple_fsdp_of_a_family_equals_fsdp2(family: str, layout: str) -> None:
    """Two microbatches of two rows by each rank that reads its own."""
    mode = "selective" if layout == "fsdp" else "full"
    case = Case(small(family), LAYOUTS[layout], world_size=2, length=16, local_batch_size=2, checkpoint=mode)
    check_ranks([case], 2)


def gathers_ahead(graph: Graph) -> list[bool]:
    """Of each gather of a weight but a phase's first whether it starts before the one in front is waited for."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    gathers = [node for node in graph.nodes if node.target is GATHER_OP and is_of_weight(node)]
    pairs = [pair for pair in pairwise(gathers) if is_backward(pair[0]) == is_backward(pair[1])]
    return [place[later] < min(place[user] for user in earlier.users) for earlier, later in pairs]


def test_gathers_start_a_message_ahead() -> None:
    """Seen in the graph alone, among ranks that are not there."""
    case = Case(Toy.Config(), n_rows=4, length=16, world_size=2, checkpoint="full")
    with fake_ranks(2, 0):
        _, objective = built_for_graphs(case, GraphCompile())
        (batch,) = batches_of(case, objective.layout)
        microbatch = objective.layout.to_rank_tokens(batch, documents=True)
        traced = objective.trace(microbatch, None, objective.inputs(microbatch, 32.0, None))
        found = {}
        for name in ("merge_collectives", "prefetch"):
            graphs = GraphCompile(passes=EVERY_PASS[: EVERY_PASS.index(name) + 1])
            names = list(objective.slots.names.values())
            prepared = prepare(deepcopy(traced), graphs, objective.policies, names, let_go=objective.let_go)
            found[name] = gathers_ahead(prepared.module.graph)
    assert len(found["prefetch"]) >= 4 and all(found["prefetch"]) and not any(found["merge_collectives"])


def check_compiled(
    model: Decoder.Config, regions: Literal["whole", "blocks"], mode: Any, *, gradients: float, following: float
) -> None:
    """A step by a graph that Inductor compiled is the eager one: loss and norm to 1e-6, `gradients` as one vector
    of all weights, single numbers by the largest of their weight, as layouts are, and the `following` loss."""
    case = Case(model, n_rows=4, length=16, checkpoint=mode)
    check_step(*compiled_and_eager(case, regions), gradients=gradients, following=following)


def compiled_and_eager(case: Case, regions: Literal["whole", "blocks"]) -> tuple[StepResult, StepResult]:
    return graph_step(case, GraphCompile(enable=True, regions=regions)).result, result_of(case)


def check_step(compiled: StepResult, eager: StepResult, *, gradients: float, following: float) -> None:
    worst = largest_differences([compiled], eager)
    assert worst.pop("gradient") < 1e-5
    assert worst.pop("next loss") < following
    assert max(worst.values()) < 1e-6, worst
    found, expected = (torch.cat([each.flatten() for each in step.gradients.values()]) for step in (compiled, eager))
    assert (found - expected).norm() < gradients * expected.norm()


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("regions", ["whole", "blocks"])
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_graph_is_eager_to_a_millionth(regions: Any, mode: Any) -> None:
    check_compiled(ToyMoE.Config(), regions, mode, gradients=1e-6, following=1e-6)


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama3", "qwen3", "gpt_oss", "deepseek_v3"])
def test_a_family_compiled_whole_is_eager(family: str, mode: str) -> None:
    """Gradients of larger sums are rounded to 1.4e-6, and Adam's step makes more of what is nearly 0."""
    check_compiled(small(family), "whole", mode, gradients=2e-6, following=5e-6)


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("regions", ["whole", "blocks"])
def test_a_compiled_graph_of_simple_fsdp_is_fsdp2(regions: Literal["whole", "blocks"]) -> None:
    case = Case(ToyMoE.Config(), world_size=2, n_rows=8, length=16, checkpoint="selective")
    for compiled, eager in run_ranks(compiled_and_eager, 2, case, regions, timeout_s=600):
        check_step(compiled, eager, gradients=2e-6, following=5e-6)


def products_run(call: Callable[..., Any], inputs: list[Tensor]) -> int:
    """The matrix products that one run of a graph computes."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(*inputs)
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm"))


@pytest.mark.matrix
@pytest.mark.slow
def test_two_save_sets_in_one_cache_of_inductor_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    case = Case(Toy.Config(n_layers=1), n_rows=2, length=16, loss=CrossEntropy.Config())
    built, objective = built_for_graphs(case, GraphCompile())
    (model,), (batch,) = built.models, map(with_all_labels, batches_of(case, objective.layout))
    microbatch = objective.layout.to_rank_tokens(batch, documents=True)
    inputs = objective.inputs(microbatch, 32.0, None)
    traced = objective.trace(microbatch, None, inputs)
    n_nodes: dict[str, int] = {}
    found: dict[str, int] = {}
    for mode in MODES:
        policies = ActivationCheckpoint.Config(mode=mode).build(folder=Path()).policies(model)
        prepared = prepare(deepcopy(traced), GraphCompile(enable=True), policies, [], let_go=False)
        nodes = prepared.module.graph.nodes
        n_nodes[mode] = sum(node.target is torch.ops.aten.mm.default for node in nodes)
        found[mode] = products_run(prepared.call, [each.detach() for each in inputs])
    assert found["none"] < found["selective"] < found["full"]
    (few, more), (run_few, run_more) = (
        (counts["selective"] - counts["none"], counts["full"] - counts["none"]) for counts in (n_nodes, found)
    )
    assert few * run_more == more * run_few, "as many products more as nodes; the profiler has several events for each"


def test_a_dry_run_plans_the_graph(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--model.n_layers", "2", "--model.dim", "64", "--training.seq_len", "64", "--training.device", "cpu"]
    flags = ["--dry-run", "--world-size", "2", "--json", "--activation_checkpoint.mode", "none", *sizes]
    plans = []
    for recipes_of, name in ((qwen3_configs, "qwen3_debug"), (configs, "graph_trainer_debug")):
        cli.main(recipes_of, ["--config", name, *flags])
        plans.append(json.loads(capsys.readouterr().out))
    fsdp2, simple = plans
    for same in ("weights_bytes", "gradients_bytes", "optimizer_bytes", "flops"):
        assert simple[same] == fsdp2[same]
    assert simple["peak_at"] == "a step's graph" and simple["notes"][-1].startswith("activations are those of a step's")
    assert 0.7 < simple["peak_bytes"] / fsdp2["peak_bytes"] < 1.1
    sent = [
        {each["collective"]: each["bytes"] for each in found["traffic"] if each["axis"] != "all"} for found in plans
    ]
    assert sent[0]["reduce-scatter"] <= sent[1]["reduce-scatter"] < 1.5 * sent[0]["reduce-scatter"]


def tiny_run(folder: Path, config: Trainer.Config) -> Trainer.Config:
    """A debug run with a small model, on a text of one page."""
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for n in range(60):
        (text / f"{n:02}.txt").write_text(f"{n} green bottles hanging on the wall, and if one should fall\n" * 3)
    config.model.dim, config.model.n_layers = 64, 2
    config.dataloader.dataset, config.dataloader.cache_folder = str(text), str(folder / "cache")
    config.training.steps, config.training.seq_len, config.training.device = 3, 32, "cpu"
    config.training.local_batch_size, config.training.global_batch_size = 2, 4
    config.checkpoint, config.metrics.log_freq, config.validator.steps = Checkpoint(), 1, 1
    config.dump_folder = str(folder / type(config).__qualname__)
    return config


def test_a_run_of_graphs_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = []
    for recipe in (qwen3_debug(), configs.graph_trainer_debug()):
        trainer = tiny_run(tmp_path, recipe).build()
        trainer.run()
        lines = map(json.loads, (trainer.folder / "metrics.jsonl").read_text().splitlines())
        losses.append([(line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line])
    assert losses[0] == [pytest.approx(each, rel=1e-6) for each in losses[1]] and len(losses[0]) >= 3
    log = capsys.readouterr().out
    size = r"[\d,]+ -> [\d,]+ nodes, kept [\d.]+ -> [\d.]+ MiB, peak [\d.]+ -> [\d.]+ MiB"
    assert re.findall(rf"graph pass (\w+): {size}", log) == ["dead_code", "save_set"]


def numbers_by_layer(folder: Path, config: Trainer.Config) -> dict[str, float]:
    """What a run of one step says of single layers."""
    run = tiny_run(folder, config)
    run.training.steps, run.metrics.per_layer_freq = 1, 1
    trainer = run.build()
    trainer.run()
    (first, *_) = map(json.loads, (trainer.folder / "metrics.jsonl").read_text().splitlines())
    return {name: number for name, number in first.items() if "/" in name}


def test_the_step_that_is_traced_is_measured_layer_by_layer(tmp_path: Path) -> None:
    """All but what only a look into a block that runs can tell."""
    eager, found = (numbers_by_layer(tmp_path, each) for each in (qwen3_debug(), configs.graph_trainer_debug()))
    hidden = {name for name in eager if name.startswith(("activation_rms/", "attention_max_logit/"))}
    assert hidden and found.keys() == eager.keys() - hidden
    for name in found:
        assert found[name] == pytest.approx(eager[name], rel=1e-5), name


def train_until(run: str, leaves_at: int) -> None:
    """Train the run of this JSON, asked to stop in step `leaves_at`; 0 asks for nothing."""
    trainer = from_json(run).build()
    step = trainer.step

    def leaving(number: int) -> StepInfo:
        if number == leaves_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(number)

    trainer.step = leaving
    trainer.run()


def measured_steps(folder: Path) -> list[dict[str, float]]:
    """The losses, norms and validation losses of a run."""
    names = ("step", "loss", "grad_norm", "validation_loss")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: line[name] for name in names if line.get(name) is not None} for line in lines if "loss" in line]


@pytest.mark.layout
def test_a_run_goes_on_as_graphs_and_back(tmp_path: Path) -> None:
    """Checkpoints of FSDP2 and of simple FSDP are alike: a run of two ranks that is a graph's every second time."""

    def run_of(name: str, recipe: Trainer.Config) -> str:
        run = tiny_run(tmp_path, recipe)
        run.training.steps, run.training.global_batch_size = 6, 8
        run.validator.enable, run.validator.freq = True, 3
        run.checkpoint = Checkpoint(enable=True, interval=2, allow_config_change=True)
        run.dump_folder = str(tmp_path / name)
        return to_json(run)

    run_ranks(train_until, 2, run_of("whole", qwen3_debug()), 0)
    for recipe, leaves_at in ((qwen3_debug, 2), (configs.graph_trainer_debug, 4), (qwen3_debug, 0)):
        run_ranks(train_until, 2, run_of("moving", recipe()), leaves_at)
    expected, found = measured_steps(tmp_path / "whole"), measured_steps(tmp_path / "moving")
    assert [line["step"] for line in expected] == [1, 2, 3, 4, 5, 6] and sum(map(len, expected)) == 3 * 6 + 2
    assert found == [pytest.approx(line, rel=1e-5) for line in expected]


def test_passes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(configs, ["--config", "graph_trainer_debug", "--compile.passes", "prefetsh"])
    assert stopped.value.code == 2
    assert "prefetch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("compile.passes", ["dead_code"], "selective is the work of the pass save_set"),
        ("compile.passes", ["save_set", "save_set"], "named twice"),
        ("parallelism.pipeline_parallel_degree", 2, "pipeline_parallel_degree 2: a step's graph is of one stage"),
        ("parallelism.cpu_offload", True, "unset cpu_offload"),
        ("optimizer.in_backward", True, "returns all gradients at once"),
        ("activation_checkpoint.mode", "memory_budget", "use none, selective or full"),
        ("debug.detect_anomaly", True, "no traceback"),
        ("profiling.enable_memory_snapshot", True, "its log has peaks"),
    ],
)
def test_what_no_graph_does_is_refused(path: str, value: Any, message: str) -> None:
    config = configs.graph_trainer_debug()
    owner, name = path.split(".")
    setattr(getattr(config, owner), name, value)
    with pytest.raises(UserError, match=message):
        validate(config)


def test_recipes_differ_from_those_that_they_are_derived_from_in_how_they_compile() -> None:
    derived = {
        "graph_trainer_debug": qwen3_debug,
        "graph_trainer_qwen3_moe_debug": qwen3_moe_debug,
        "graph_trainer_llama3_debug": llama3_debug,
        "graph_trainer_deepseek_v3_debug": deepseek_v3_debug,
        "graph_trainer_gpt_oss_debug": gpt_oss_debug,
    }
    assert recipes(configs).keys() == derived.keys()
    for name, recipe in recipes(configs).items():
        config, base = recipe(), derived[name]()
        validate(config)
        found = {path for path, _, value in diff(config, base) if value is not ...}
        assert {path.partition(".")[0] for path in found} <= {"class", "compile"}
        assert isinstance(config, GraphTrainer.Config)
