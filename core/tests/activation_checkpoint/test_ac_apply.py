"""Activation checkpointing on whole models: gradients, recomputed products, names, and every setting."""

import gc
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch
from torch.utils.checkpoint import CheckpointError
from torch.utils.flop_counter import FlopCounterMode

from core.activation_checkpoint import apply, ops
from core.activation_checkpoint.apply import ActivationCheckpoint
from core.activation_checkpoint.region import is_recomputing
from core.config.errors import UserError
from core.config.validate import validate
from core.nn.kernel import Positions
from core.nn.weights import weights
from core.runtime.log import log as LOGGER
from core.runtime.log import start_logging
from core.testing.activation_checkpoint import (
    Dispatched,
    assert_equal_gradients,
    autograd_bytes,
    checkpoint_blocks,
    gradients,
    products,
    weights_used,
)
from core.testing.oracles import cross_entropy
from core.testing.toy import Toy, on_cpu, randomise
from core.weights.hf import load_hf, save_hf

MODES = ["selective", "full"]
CHECKPOINTED = [
    {"mode": "selective"},
    {"mode": "full"},
    {"mode": "selective", "early_stop": True},
    {"mode": "full", "early_stop": True},
    {"mode": "selective", "per_op_sac_force_recompute_mm_shapes_by_fqns": ["attention.wq"]},
    {"mode": "selective", "force_recompute": ["attention.wv", "feed_forward"]},
    {"mode": "full", "force_recompute": ["attention"]},
    {"mode": "selective", "save_ops": ["aten.silu.default", "aten.mul.Tensor"]},
    {"mode": "selective", "debug": True},
    {"mode": "full", "debug": True},
    {"mode": "selective", "preserve_rng_state": False, "determinism_check": "none"},
]

ignore_dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
"""Dynamo asks a block's input for its gradient."""


def toy_training(mask="causal", n_layers=2, **settings):
    """A toy and its loss on three rows, one of two documents each where the mask asks for it."""
    model = on_cpu(Toy.Config(n_layers=n_layers))
    randomise(model, seed=1)
    checkpoint_blocks(model, **settings)
    tokens_BL = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(0))
    index_L = torch.arange(20)
    document_BL = (index_L >= torch.tensor([[3], [10], [17]])).long()
    positions = Positions(index_L.expand(3, 20), document_BL) if mask == "document" else None
    return model, lambda: cross_entropy(model(tokens_BL, positions), tokens_BL.roll(-1, dims=1))


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def messages(caplog, monkeypatch):
    """What is logged, also where a run before has sent it to the console."""
    monkeypatch.setattr(LOGGER, "propagate", True)
    with caplog.at_level(logging.INFO, LOGGER.name):
        yield caplog


def compile_blocks(model, backend="aot_eager"):
    for block in model.layers.values():
        block.compile(backend=backend, fullgraph=True)


@pytest.mark.parametrize("mask", ["causal", "document"])
@pytest.mark.parametrize("settings", CHECKPOINTED, ids=str)
def test_gradients_are_those_of_none(settings, mask):
    expected = gradients(*toy_training(mask, mode="none"))
    model, loss = toy_training(mask, **settings)
    for _ in range(2):
        assert_equal_gradients(gradients(model, loss), expected)


@ignore_dynamo
@pytest.mark.parametrize("settings", [CHECKPOINTED[i] for i in (0, 1, 5, 7, 8)], ids=str)
def test_compiled_gradients_are_those_of_none(settings):
    expected = gradients(*toy_training("document", mode="none"))
    model, loss = toy_training("document", **settings)
    compile_blocks(model)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@ignore_dynamo
def test_equal_blocks_are_one_graph():
    counters.clear()
    model, loss = toy_training(mode="selective", n_layers=4)
    compile_blocks(model)
    loss().backward()
    assert counters["stats"]["unique_graphs"] == 1

    counters.clear()
    torch._dynamo.reset()
    forced = ["layers.0.attention.wk", "layers.2.attention.wk"]
    model, loss = toy_training(mode="selective", n_layers=4, per_op_sac_force_recompute_mm_shapes_by_fqns=forced)
    compile_blocks(model)
    loss().backward()
    assert counters["stats"]["unique_graphs"] == 2
    policies = [block.forward.args[1]["context_fn"] for block in model.layers.values()]
    assert policies[0] is policies[2] is not policies[1] is policies[3]


@ignore_dynamo
def test_compiled_blocks_save_what_eager_ones_do():
    """Bytes that autograd keeps for a compiled block, which has no region inside, fall from mode to mode."""
    saved = []
    for mode in ("none", "selective", "full"):
        torch._dynamo.reset()
        model, loss = toy_training(mode=mode)
        compile_blocks(model)
        saved.append(autograd_bytes(loss))
    assert saved[0] > saved[1] > saved[2]


# --- which products are repeated, and at what cost


class Gated(nn.Module):
    """A block of three products, two of the same shape; gate has the name of a router's."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = nn.Module()
        self.moe.router = nn.Module()
        self.moe.router.gate = nn.Linear(512, 512, bias=False)
        self.wq = nn.Linear(512, 512, bias=False)
        self.output = nn.Linear(512, 1024, bias=False)

    def forward(self, x):
        return self.output(self.wq(self.moe.router.gate(x)))


class Blocks(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): block for i, block in enumerate(blocks)})

    def forward(self, x):
        for block in self.layers.values():
            x = block(x)
        return x


UNIT = 2 * 512**3
NO_SHAPES = {"mode": "selective", "per_op_sac_force_recompute_mm_shapes_by_fqns": []}
SHAPES = "per_op_sac_force_recompute_mm_shapes_by_fqns"


@pytest.mark.parametrize(
    ("settings", "units", "again"),
    [
        ({"mode": "none"}, 8, ""),
        (NO_SHAPES, 9, "wq"),
        ({"mode": "selective"}, 10, "moe.router.gate wq"),
        ({"mode": "selective", SHAPES: ["router.gate"]}, 10, "moe.router.gate wq"),
        ({"mode": "selective", SHAPES: ["output"]}, 11, "wq output"),
        ({"mode": "selective", SHAPES: ["output", "wq"]}, 12, "moe.router.gate wq output"),
        ({"mode": "full"}, 12, "moe.router.gate wq output"),
        ({"mode": "full", "early_stop": True}, 10, "moe.router.gate wq"),
        # by exact name: gate has the shape of wq, and is saved as the first that is counted; output is the second
        ({**NO_SHAPES, "force_recompute": ["wq"]}, 11, "wq output"),
        ({**NO_SHAPES, "force_recompute": ["moe.router.gate"]}, 11, "moe.router.gate output"),
        ({**NO_SHAPES, "force_recompute": ["moe.router.gate", "output"]}, 11, "moe.router.gate output"),
        ({**NO_SHAPES, "force_recompute": ["wq", "output"]}, 11, "wq output"),
    ],
    ids=str,
)
def test_flops_of_backward_and_what_is_repeated(settings, units, again):
    torch.manual_seed(0)
    model = Blocks(Gated())
    checkpoint_blocks(model, **settings)
    x = torch.randn(512, 512, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = model(x).sum()
    with FlopCounterMode(display=False) as counted:
        y.backward()
    assert forward.get_total_flops() == 4 * UNIT
    assert counted.get_total_flops() == units * UNIT
    found = products(model, lambda: model(x).sum())
    names = [name.removeprefix("layers.0.") for name in found]
    assert names == ["moe.router.gate", "wq", "output"]
    assert [name for name, repeated in zip(names, found.values(), strict=True) if repeated] == again.split()


def test_dense_block_saves_the_products_of_the_published_policy():
    everything = {name for name in products(*toy_training(mode="full")) if name != "output"}
    found = products(*toy_training(mode="selective", n_layers=3))
    for number in range(3):
        block = {name: again for name, again in found.items() if name.startswith(f"layers.{number}.")}
        written = " ".join(name.rpartition(".")[2] + "*" * again for name, again in block.items())
        assert written == "wq wk* wv wo* w1 w3* w2"
    again = {name for name, repeated in products(*toy_training(mode="full")).items() if repeated}
    assert again == everything, "all but the head, which is no part of a block"
    assert not any(products(*toy_training(mode="none")).values())


def test_biased_layers_are_counted_too():
    torch.manual_seed(0)
    block = nn.Sequential(*(nn.Linear(4, 4, bias=i % 2 == 0) for i in range(4)))
    model = Blocks(block)
    checkpoint_blocks(model, "selective")
    found = products(model, lambda: model(torch.randn(2, 4, requires_grad=True)).square().sum())
    assert list(found.values()) == [False, True, False, True]


# --- names


def test_names_of_weights_stay():
    model = on_cpu(Toy.Config())
    state, named = list(model.state_dict()), [(w.name, w.axes, w.start) for w in weights(model)]
    modules = [name for name, _ in model.named_modules()]
    for settings in ({"mode": "selective", "force_recompute": ["attention"], "debug": True}, {"mode": "full"}):
        checkpoint_blocks(model, **settings)
        assert list(model.state_dict()) == state
        assert [(w.name, w.axes, w.start) for w in weights(model)] == named
        assert [name for name, _ in model.named_modules()] == modules


@pytest.mark.parametrize("mode", MODES)
def test_loads_and_saves_after_it_is_applied(tmp_path, mode):
    plain, checkpointed = on_cpu(Toy.Config()), on_cpu(Toy.Config())
    randomise(plain, seed=3)
    checkpoint_blocks(checkpointed, mode)
    save_hf(plain, tmp_path / "a")
    load_hf(checkpointed, tmp_path / "a")
    save_hf(checkpointed, tmp_path / "b")
    again = on_cpu(Toy.Config())
    load_hf(again, tmp_path / "b")
    for name, value in plain.state_dict().items():
        assert torch.equal(checkpointed.state_dict()[name], value) and torch.equal(again.state_dict()[name], value)


def test_force_recompute_names_what_there_is():
    for name in ("attention.wqq", "wq", "attention."):
        with pytest.raises(UserError) as caught:
            toy_training(mode="selective", force_recompute=["attention.wo", name])
        assert f"force_recompute: no block has {name}; it has attention.wq, attention.wk" in str(caught.value)
        assert "feed_forward.w2" in str(caught.value) and "norm" not in str(caught.value)


@pytest.mark.parametrize(("part", "kind"), [("attention", "RMSNorm"), ("feed_forward", "FeedForward"), ("q_n", "RMSN")])
def test_a_part_of_a_name_must_be_of_linear_layers(part, kind):
    with pytest.raises(UserError) as caught:
        toy_training(mode="selective", per_op_sac_force_recompute_mm_shapes_by_fqns=[part])
    text = str(caught.value)
    assert f"shapes_by_fqns: {part} names layers.0." in text and f"a {kind}" in text and "attention.wq" in text


def test_a_part_of_a_name_may_be_any_part():
    shapes = toy_training(mode="selective", per_op_sac_force_recompute_mm_shapes_by_fqns=["feed_forward.w"])[0]
    found = shapes.layers["0"].forward.args[1]["context_fn"].args[2]
    assert found == {(16, 24), (24, 16)}


# --- settings


def test_mode_none_leaves_the_blocks_alone():
    model = on_cpu(Toy.Config())
    checkpoint_blocks(model, "none")
    assert all("forward" not in vars(block) for block in model.layers.values())


def test_problems_are_told_before_a_run(monkeypatch):
    good = ActivationCheckpoint.Config(save_ops=["aten.silu.default"], memory_budget=0.0)
    validate(good)
    monkeypatch.setattr(apply, "find_spec", lambda name: None)
    config = ActivationCheckpoint.Config(
        memory_budget=1.5,
        visualize_memory_budget_pareto=True,
        save_ops=["aten.silu", "aten.nonsense.default"],
    )
    with pytest.raises(UserError) as caught:
        validate(config)
    for part in (
        "memory_budget: memory_budget 1.5 must be between 0 and 1",
        "visualize_memory_budget_pareto: matplotlib is not installed: pip install matplotlib",
        "aten.silu is a OpOverloadPacket",
        "has no operation aten.nonsense.default",
    ):
        assert part in str(caught.value)
    monkeypatch.setattr(apply, "find_spec", lambda name: object())
    validate(ActivationCheckpoint.Config(visualize_memory_budget_pareto=True))
    with pytest.raises(UserError, match="memory_budget nan"):
        validate(ActivationCheckpoint.Config(memory_budget=float("nan")))
    with pytest.raises(UserError, match="mode"):
        validate(ActivationCheckpoint.Config(mode="some"))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(16, 16)

    def forward(self, x):
        return nn.functional.dropout(self.w(x), 0.5).sin()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("preserve", [True, False])
def test_random_numbers_are_drawn_again(mode, preserve):
    found = {}
    for current in ("none", mode):
        torch.manual_seed(0)
        model = Blocks(Dropping(), Dropping())
        checkpoint_blocks(model, current, preserve_rng_state=preserve)
        found[current] = gradients(model, lambda model=model: model(torch.ones(4, 16)).sum())
    same = all(torch.equal(found[mode][name], gradient) for name, gradient in found["none"].items())
    assert same is preserve


class Shrinking(nn.Module):
    """Does the same operations the second time, on fewer rows."""

    def forward(self, x):
        n = 1 if is_recomputing() else 4
        return x[:n].exp()


@pytest.mark.parametrize("mode", MODES)
def test_shapes_are_compared_unless_told_not_to(mode):
    x = torch.ones(4, 2, requires_grad=True)
    model = Blocks(Shrinking())
    checkpoint_blocks(model, mode)
    with pytest.raises(CheckpointError, match="different metadata"):
        model(x).sum().backward()
    model = Blocks(Shrinking())
    checkpoint_blocks(model, mode, determinism_check="none")
    model(x).sum().backward()
    assert x.grad is not None


class Remembering(nn.Module):
    """Works something out on its first call alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.inner = nn.Linear(4, 4), nn.Module()
        self.inner = Once()

    def forward(self, x):
        return self.inner(self.w(x))


class Once(nn.Module):
    scale: torch.Tensor | None = None

    def forward(self, x):
        if self.scale is None:
            self.scale = torch.ones(4) * 2
        return (x * self.scale).sin()


@pytest.mark.parametrize("mode", MODES)
def test_one_time_work_in_a_block_is_named(mode):
    for debug, place in ((True, "in forward in layers.1.inner"), (False, "--activation_checkpoint.debug names")):
        model = Blocks(nn.Linear(4, 4), Remembering())
        checkpoint_blocks(model, mode, debug=debug)
        y = model(torch.ones(2, 4)).sum()
        with pytest.raises(CheckpointError, match="was aten.ones.default") as caught:
            y.backward()
        assert place in str(caught.value)


def report(model_settings, step=True):
    model = on_cpu(Toy.Config())
    activation_checkpoint = ActivationCheckpoint.Config(**model_settings).build(folder=Path())
    activation_checkpoint.apply(model)
    if step:
        model(torch.arange(24).view(2, 12)).sum().backward()
    activation_checkpoint.report()


def test_debug_reports_what_was_saved(messages, monkeypatch):
    monkeypatch.setattr(ops, "OPTIONAL", ("feature.that_nobody_loaded.default",))
    report({"debug": True, "save_ops": ["aten.silu.default", "aten.erf.default"]})
    text = messages.text
    assert "aten.mm.default saved 8 times" in text  # four of seven in each of two blocks
    assert "aten._scaled_dot_product_flash_attention_for_cpu.default saved 2 times" in text
    assert "aten.silu.default saved 2 times" in text
    assert "aten.mul.Tensor" not in text
    assert "not in this process: feature.that_nobody_loaded.default" in text
    warnings = [record.message for record in messages.records if record.levelno == logging.WARNING]
    assert warnings == ["activation_checkpoint.save_ops: aten.erf.default was never dispatched in a block"]


def test_counts_are_of_this_run(messages):
    for _ in range(2):
        messages.clear()
        report({"debug": True})
        assert "aten.mm.default saved 8 times" in messages.text


@pytest.mark.parametrize("settings", [{}, {"mode": "none", "debug": True}, {"mode": "full", "debug": True}], ids=str)
def test_without_debug_or_list_there_is_no_report(messages, settings):
    report(settings)
    assert not messages.records


@ignore_dynamo
def test_debug_of_a_compiled_model(messages):
    """Neither the names of modules nor the counts give a block a graph of its own, or more than dynamo allows."""
    counters.clear()
    model = on_cpu(Toy.Config(n_layers=10))
    settings = {"debug": True, "save_ops": ["aten.silu.default"], "force_recompute": ["attention.wv"]}
    activation_checkpoint = ActivationCheckpoint.Config(**settings).build(folder=Path())
    activation_checkpoint.apply(model)
    compile_blocks(model)
    model(torch.arange(24).view(2, 12)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    activation_checkpoint.report()
    assert "aten.mm.default saved" in messages.text and "aten.silu.default saved" in messages.text
    assert not [record for record in messages.records if record.levelno == logging.WARNING]


@ignore_dynamo
def test_exact_names_count_in_compiled_blocks():
    """The mark on wv moves the alternation: wo is the third that counts. The last, w2, is repeated where backward does
    not stop early, and left out of a compiled graph, which sees that nothing needs it."""
    model, loss = toy_training(mode="selective", n_layers=1, force_recompute=["attention.wv"], early_stop=True)
    eager = products(model, loss)
    compile_blocks(model)
    value = loss()
    with Dispatched() as backward:
        value.backward()
    uses = weights_used(model, backward)
    assert {name: uses[name] == 2 for name in eager} == eager
    written = " ".join(name.rpartition(".")[2] + "*" * again for name, again in eager.items())
    assert written == "wq wk* wv* wo w1* w3 w2 output"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "full", "save_ops": ["aten.silu.default"]}, "save_ops has no effect in mode full: use selective"),
        ({"mode": "none", "force_recompute": ["attention.wq"]}, "no effect in mode none: use selective or full"),
    ],
)
def test_a_list_that_its_mode_ignores_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        validate(ActivationCheckpoint.Config(**settings))


def test_a_part_of_a_name_that_names_nothing_is_a_warning(messages):
    toy_training(mode="selective", per_op_sac_force_recompute_mm_shapes_by_fqns=["moe.router.gate"])
    assert "names no module" not in messages.text, "dense models have no router, and that is the default"
    toy_training(mode="selective", per_op_sac_force_recompute_mm_shapes_by_fqns=["attention.wqq"])
    assert "attention.wqq names no module" in messages.text


@pytest.fixture
def budget_settings():
    """torch's settings of its memory budget, put back after the test; a monkeypatch would delete them instead."""
    names = ("activation_memory_budget", "visualize_memory_budget_pareto", "memory_budget_pareto_dir")
    before = {name: getattr(functorch, name) for name in names}
    yield
    for name, value in before.items():
        setattr(functorch, name, value)


@pytest.mark.usefixtures("budget_settings")
def test_pictures_are_kept_and_a_disk_that_takes_none_ends_nothing(tmp_path, capsys):
    """What torch draws in the middle of compiling lies elsewhere until the first step is over."""
    start_logging()
    config = ActivationCheckpoint.Config(mode="memory_budget", visualize_memory_budget_pareto=True)
    checkpoint = config.build(folder=tmp_path / "run")
    checkpoint.apply(Toy.Config(vocab_size=8).build())
    drawn = Path(functorch.memory_budget_pareto_dir)
    (drawn / "block.svg").write_text("<svg/>")
    (tmp_path / "run").write_text("no folder")
    checkpoint.report()
    cause = f"{tmp_path}/run/memory_budget_pareto cannot be written: Not a directory; the run goes on without it"
    assert capsys.readouterr().out == f"warning: {cause}\n"
    (tmp_path / "run").unlink()
    checkpoint.report()
    assert (tmp_path / "run/memory_budget_pareto/block.svg").read_text() == "<svg/>"
    del checkpoint
    gc.collect()
    assert not drawn.exists()
