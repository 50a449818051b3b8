"""What settings of a layout are refused, all at once, each with the numbers and the mend."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from core.activation_checkpoint.apply import ActivationCheckpoint
from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.validate import validate
from core.nn.attention import Attention
from core.nn.decoder import Decoder
from core.nn.feed_forward import FeedForward
from core.nn.layers import Linear
from core.nn.mla import MLA
from core.nn.module import Module
from core.nn.start import Scale
from core.parallel.settings import Degrees, Parallelism, describe_degrees, world_problems
from core.runtime.meta import meta_model
from core.step.checks import check_layout
from core.step.settings import Compile, Training
from core.step.shares import check_shares
from core.testing.layout_suite import degrees
from core.testing.toy import Toy, ToyMoE
from core.train.trainer import Trainer


def check(
    parallelism: Parallelism,
    world_size: int,
    *,
    model: Decoder.Config | None = None,
    mode: str = "none",
    compiled: bool = False,
    **training: Any,
) -> None:
    run = Trainer.Config(
        model=model or Toy.Config(),
        parallelism=parallelism,
        training=Training(**{"seq_len": 64, "local_batch_size": 4, **training}),
        activation_checkpoint=ActivationCheckpoint.Config(mode=mode),
        compile=Compile(enable=compiled),
    )
    check_layout(run, world_size)


def refusal(parallelism: Parallelism, world_size: int, **changes: Any) -> list[str]:
    """The lines of the error."""
    with pytest.raises(UserError) as caught:
        check(parallelism, world_size, **changes)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("parallelism", "world_size", "expected"),
    [
        (degrees(), 1, Degrees()),
        (degrees(), 6, Degrees(shard=6)),
        (degrees(replicate=2), 6, Degrees(replicate=2, shard=3)),
        (degrees(replicate=2, data_parallel_shard_degree=1), 2, Degrees(replicate=2)),
        (degrees(tensor=4, context=2, pipeline=3, expert=8), 48, Degrees(3, 1, 2, 2, 4, 8)),
    ],
)
def test_what_is_left_shards_the_weights(parallelism: Parallelism, world_size: int, expected: Degrees) -> None:
    assert parallelism.degrees(world_size) == expected
    assert expected.world == world_size and not list(world_problems(parallelism, world_size))


def test_degrees_say_what_follows_from_them() -> None:
    spread = Degrees(pipeline=2, replicate=3, shard=5, context=7, tensor=11, expert=13)
    assert spread.world == 2 * 3 * 5 * 7 * 11
    assert spread.data == 3 * 5
    assert spread.sequence_multiple == 11 * 2 * 7
    assert Degrees(tensor=4).sequence_multiple == 4
    text = describe_degrees(Degrees(shard=4, tensor=2, expert=8), "standard")
    assert text == "8 (shard 4 x tensor 2, experts over 8 by standard)"
    assert describe_degrees(Degrees(), "standard") == "1"


@pytest.mark.parametrize("name", [name for name in Parallelism.__dataclass_fields__ if name.endswith("_degree")])
@pytest.mark.parametrize("value", [0, -1, -2])
def test_a_degree_is_at_least_one(name: str, value: int) -> None:
    settings = Parallelism(**{name: value})
    if (name, value) == ("data_parallel_shard_degree", -1):
        validate(settings)
        return
    with pytest.raises(UserError, match=f"^{name}: {name} {value} must be at least 1$"):
        validate(settings)


@pytest.mark.parametrize(
    ("parallelism", "world_size", "words"),
    [
        (degrees(tensor=2), 3, "tensor_parallel_degree 2 makes 2 ranks, and 3 started: change a degree, start 2, or"),
        (degrees(tensor=4), 2, "tensor_parallel_degree 4 makes 4 ranks, and 2 started"),
        (degrees(data_parallel_shard_degree=1), 4, "all degrees 1 makes 1 ranks, and 4 started"),
        (
            degrees(replicate=2, data_parallel_shard_degree=3, context=2),
            4,
            "data_parallel_replicate_degree 2 x data_parallel_shard_degree 3 x context_parallel_degree 2 makes 12",
        ),
    ],
)
def test_the_product_is_the_number_of_ranks(parallelism: Parallelism, world_size: int, words: str) -> None:
    ((field, message),) = world_problems(parallelism, world_size)
    assert field == "data_parallel_shard_degree" and words in message


def test_experts_divide_the_ranks_that_hold_them() -> None:
    assert refusal(degrees(expert=3), 4, model=ToyMoE.Config()) == [
        "parallelism.expert_parallel_degree: expert_parallel_degree 3 must divide shard x context x tensor = 4: "
        "use 1, 2, 4"
    ]
    (line,) = refusal(degrees(expert=4, tensor=2), 4, model=ToyMoE.Config())
    assert line == "model.moe.router.n_experts: expert_parallel_degree 4 must divide n_experts 6: use 1, 2, 3, 6"
    check(degrees(expert=2, tensor=2), 2, model=ToyMoE.Config())
    (line,) = refusal(degrees(expert=2), 2)
    assert line.endswith("expert_parallel_degree 2 asked for, and the model has no experts: leave it at 1")


def test_experts_want_a_mesh_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.parallel.data.HAS_MESH_PER_WEIGHT", False)
    check(degrees(tensor=2), 4)
    check(degrees(context=2), 4, model=ToyMoE.Config())
    for axis in ("expert", "tensor"):
        (line,) = refusal(degrees(**{axis: 2}), 4, model=ToyMoE.Config())
        assert f": {axis}_parallel_degree 2 with experts needs torch 2.12, this is {torch.__version__}" in line


def test_heads_are_shared() -> None:
    assert refusal(degrees(tensor=4), 4) == [
        "model.attention.n_kv_heads: tensor_parallel_degree 4 must divide n_kv_heads 2: use 1, 2"
    ]
    assert refusal(degrees(tensor=3), 3, seq_len=63) == [
        "model.attention.n_heads: tensor_parallel_degree 3 must divide n_heads 4: use 1, 2, 4",
        "model.attention.n_kv_heads: tensor_parallel_degree 3 must divide n_kv_heads 2: use 1, 2",
    ]
    check(degrees(context=4), 4)
    (line,) = refusal(degrees(context=4, context_parallel_rotate_method="alltoall"), 4)
    assert "tensor_parallel_degree 1 x context_parallel_degree 4 (rotate method alltoall) must divide" in line
    latent = MLA.Config(
        n_heads=6, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
    )
    model = Toy.Config(attention=latent)  # pyrefly: ignore[bad-argument-type] - it is only read
    (line,) = refusal(degrees(tensor=4), 4, model=model)
    assert line == "model.attention.n_heads: tensor_parallel_degree 4 must divide n_heads 6: use 1, 2, 3, 6"
    check(degrees(tensor=2), 2, model=model)


class Mixer(Module, Configurable):
    """A network of lanes, each of which a rank has whole; core does not know it."""

    AXES = {"w_in": ("heads", "embed"), "w_out": ("embed", "heads")}

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        n_lanes: int = 6
        """Number of lanes, 4 wide."""

    def __init__(self, config: Config, *, dim: int, scale: Scale) -> None:
        super().__init__()
        self.w_in = Linear(dim, 4 * config.n_lanes, std=scale.std)
        self.w_out = Linear(4 * config.n_lanes, dim, std=scale.residual)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.w_out(self.w_in(x_BLD).relu())


class Counted(Mixer):
    """The same, which says how many lanes there are."""

    SIZED_BY = {"heads": ("n_lanes",)}


def of_lanes(part: type[Mixer]) -> Toy.Config:
    heads = Attention.Config(n_heads=30, n_kv_heads=30, head_dim=2)
    return Toy.Config(attention=heads, feed_forward=part.Config())  # pyrefly: ignore[bad-argument-type]


def test_parts_that_core_does_not_know_are_shared_by_their_axes() -> None:
    """A part that says what sizes an axis is told by that setting, any other by its weight."""
    five = degrees(tensor=5)
    assert refusal(five, 5, model=of_lanes(Counted), seq_len=60) == [
        "model.feed_forward.n_lanes: tensor_parallel_degree 5 must divide n_lanes 6: use 1, 2, 3, 6"
    ]
    check_shares(meta_model(of_lanes(Counted)), five)  # is not told twice
    check(five, 5, model=of_lanes(Mixer), seq_len=60)
    with pytest.raises(UserError) as caught:
        check_shares(meta_model(of_lanes(Mixer)), five)
    fits = "use 1, 2, 3, 4, 6, 8, 12, 24"
    assert str(caught.value) == (
        f"layers.0.feed_forward.w_in.weight.heads: tensor_parallel_degree 5 must divide heads 24: {fits}"
    )
    for part in (Mixer, Counted):
        check(degrees(tensor=2), 2, model=of_lanes(part))
        check_shares(meta_model(of_lanes(part)), degrees(tensor=2))


def test_every_rank_has_a_part_of_what_tensor_ranks_share() -> None:
    """Pieces are 2, 2, 1 and 0 of five."""
    heads = Attention.Config(n_heads=4, n_kv_heads=4, head_dim=8)
    model = Toy.Config(vocab_size=5, attention=heads, feed_forward=FeedForward.Config(hidden_dim=9))
    assert refusal(degrees(tensor=4), 4, model=model) == [
        "model.vocab_size: tensor_parallel_degree 4 gives 2 of vocab_size 5 to a rank until none is left, and a rank "
        "without any is not supported: lower the degree",
        "model.feed_forward.hidden_dim: tensor_parallel_degree 4 gives 3 of hidden_dim 9 to a rank until none is left, "
        "and a rank without any is not supported: lower the degree",
    ]
    for size in (4, 7, 8, 10):
        check(
            degrees(tensor=4),
            4,
            model=replace(model, vocab_size=size, feed_forward=FeedForward.Config(hidden_dim=size)),
        )


@pytest.mark.parametrize(
    ("parallelism", "world_size", "seq_len", "words"),
    [
        (degrees(tensor=2), 2, 63, "seq_len 63 must be a multiple of 2 (tensor_parallel_degree 2): use 62"),
        (degrees(context=2), 2, 62, "must be a multiple of 4 (tensor_parallel_degree 1 x 2 context_parallel_degree 2)"),
        (degrees(context=2, tensor=2), 4, 4, "seq_len 4 must be a multiple of 8"),
        (degrees(context=2, tensor=2), 4, 4, ": use 8"),
    ],
)
def test_rows_are_cut_evenly(parallelism: Parallelism, world_size: int, seq_len: int, words: str) -> None:
    (line,) = refusal(parallelism, world_size, seq_len=seq_len)
    assert line.startswith("training.seq_len: ") and words in line
    check(parallelism, world_size, seq_len=64)


def test_batches_are_dealt_out() -> None:
    (line,) = refusal(degrees(), 3, global_batch_size=16)
    assert line.startswith(
        "training.global_batch_size: global_batch_size 16 must be a multiple of local_batch_size 4 x 3 "
    )
    assert line.endswith(" data ranks = 12, or -1")
    check(degrees(), 2, global_batch_size=16)
    (line,) = refusal(degrees(pipeline=2, pipeline_parallel_microbatch_size=3), 2, local_batch_size=8)
    assert line.endswith("pipeline_parallel_microbatch_size 3 must divide local_batch_size 8")


def test_what_is_not_supported_is_refused() -> None:
    (line,) = refusal(degrees(pipeline=2), 2, model=Toy.Config(tie_embeddings=True))
    assert "tied embedding and head" in line and "model.tie_embeddings false" in line
    for parallelism in (degrees(pipeline=2), degrees(context=2)):
        (line,) = refusal(parallelism, 2, model=Toy.Config(n_mtp_layers=1))
        assert line.startswith("model.n_mtp_layers: ") and "set n_mtp_layers 0, or" in line
    zero_bubble = degrees(pipeline=2, schedule="ZBVZeroBubble")
    (line,) = refusal(zero_bubble, 2, mode="selective")
    assert line.startswith("activation_checkpoint.mode: schedule ZBVZeroBubble computes backward in two passes")
    check(zero_bubble, 2, mode="full")
    check(degrees(schedule="ZBVZeroBubble"), 2, mode="selective")
    (line,) = refusal(degrees(tensor=2), 2, mode="full", compiled=True)
    assert line.startswith("activation_checkpoint.mode: full with compile and tensor_parallel_degree 2")
    (line,) = refusal(degrees(expert=2), 2, model=ToyMoE.Config(), mode="full", compiled=True)
    assert line.startswith("activation_checkpoint.mode: full with compile and expert_parallel_degree 2")
    for mode, compiled in (("full", False), ("selective", True), ("none", True)):
        check(degrees(tensor=2), 2, mode=mode, compiled=compiled)
        check(degrees(expert=2), 2, model=ToyMoE.Config(), mode=mode, compiled=compiled)
    check(degrees(context=2), 2, mode="full", compiled=True)
    (line,) = refusal(zero_bubble, 2, compiled=True)
    assert line.startswith("parallelism.pipeline_parallel_schedule: a compiled block has one backward, ")
    check(degrees(pipeline=2), 2, mode="full", compiled=True)


def test_all_that_is_wrong_is_said_at_once() -> None:
    model = ToyMoE.Config(tie_embeddings=True, attention=Attention.Config(n_heads=6, n_kv_heads=3, head_dim=8))
    lines = refusal(
        degrees(tensor=4, pipeline=2, expert=8, schedule="DualPipeV"),
        9,
        model=model,
        mode="selective",
        seq_len=66,
        local_batch_size=5,
        global_batch_size=7,
        compiled=True,
    )
    assert {line.split(": ")[0] for line in lines} == {
        "parallelism.data_parallel_shard_degree",
        "parallelism.expert_parallel_degree",
        "model.attention.n_heads",
        "model.attention.n_kv_heads",
        "model.moe.router.n_experts",
        "parallelism.pipeline_parallel_degree",
        "parallelism.pipeline_parallel_schedule",
        "training.seq_len",
        "training.global_batch_size",
        "activation_checkpoint.mode",
    }
