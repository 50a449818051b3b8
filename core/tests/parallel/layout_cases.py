"""Steps that a layout could get wrong, of toy models that have what the published ones have not all at once."""

from dataclasses import replace
from typing import Any

from core.nn.attention import Attention
from core.nn.feed_forward import FeedForward
from core.nn.moe import Experts, MoE, Router
from core.testing.layout_suite import LayoutCase, degrees
from core.testing.parity import Case
from core.testing.toy import Toy, ToyMoE


def attention(**changes: Any) -> Attention.Config:
    """Attention of 8 heads of the width 4, with everything that it may have but a window and sinks."""
    return Attention.Config(**{"n_heads": 8, "n_kv_heads": 4, "head_dim": 4, "qk_norm": True, "bias": True, **changes})


def dense(**changes: Any) -> Toy.Config:
    """A dense toy; neither its vocabulary nor its hidden width is a multiple of four."""
    return Toy.Config(
        **{"vocab_size": 62, "attention": attention(), "feed_forward": FeedForward.Config(hidden_dim=22), **changes}
    )


def sparse(n_experts: int = 8, *, hidden_dim: int = 12, router: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A toy of a dense block and a mixture of biased experts with a shared one."""
    settings = {"n_experts": n_experts, "top_k": 2, "load_balance_coeff": 1e-3, "bias": True, **(router or {})}
    moe = MoE.Config(
        router=Router.Config(**settings),
        experts=Experts.Config(hidden_dim=hidden_dim, bias=True),
        shared_experts=FeedForward.Config(hidden_dim=10),
    )
    return ToyMoE.Config(**{"vocab_size": 62, "attention": attention(), "moe": moe, **changes})


FSDP2, FSDP4, HSDP4 = LayoutCase(2, degrees()), LayoutCase(4, degrees()), LayoutCase(4, degrees(replicate=2))
TP2, TP4, FSDP2_TP2 = (
    LayoutCase(2, degrees(tensor=2)),
    LayoutCase(4, degrees(tensor=4)),
    LayoutCase(4, degrees(tensor=2)),
)
EP2, EP4, EP2_TP2 = (
    LayoutCase(2, degrees(expert=2)),
    LayoutCase(4, degrees(expert=4)),
    LayoutCase(2, degrees(expert=2, tensor=2)),
)
CP = {
    "cp2": LayoutCase(2, degrees(context=2)),
    "cp2-alltoall": LayoutCase(2, degrees(context=2, context_parallel_rotate_method="alltoall")),
    "cp2-tp2": LayoutCase(4, degrees(context=2, tensor=2)),
    "cp2-alltoall-tp2": LayoutCase(4, degrees(context=2, tensor=2, context_parallel_rotate_method="alltoall")),
    "cp4": LayoutCase(4, degrees(context=4)),
    "cp4-alltoall": LayoutCase(4, degrees(context=4, context_parallel_rotate_method="alltoall")),
}


def piped(n: int, schedule: str, **more: Any) -> LayoutCase:
    return LayoutCase(n, degrees(pipeline=2, schedule=schedule, **more))


def attention_cases() -> dict[str, Case]:
    """Windows, sinks, documents and rows of one document, over the ranks of a row."""
    heads = {
        "plain": {},
        "window": {"window": 5},
        "sinks": {"sinks": True},
        "window-sinks": {"window": 3, "sinks": True},
    }
    return {
        f"{layout}-{name}-{mask}": ranks.case(dense(attention=attention(**changes)), "none", mask=mask)
        for layout, ranks in CP.items()
        for name, changes in heads.items()
        for mask in ("causal", "document")
    }


def expert_cases() -> dict[str, Case]:
    """Experts that get nothing, few experts, tokens that nothing divides, balance losses."""
    balanced = sparse(router={"balance_loss_coeff": 0.5}, n_layers=3)
    idle = {
        f"idle-{name}-{mode}-{first}": ranks.case(sparse(), mode, idle_experts=range(first, first + 8 // share))
        for name, ranks, share in [("ep2", EP2, 2), ("ep4", EP4, 4), ("ep2-tp2", EP2_TP2, 2)]
        for first in (0, 8 - 8 // share)
        for mode in ("none", "full", "selective")
    }
    layouts = {"fsdp2": FSDP2, "tp2": TP2, "fsdp2-tp2": FSDP2_TP2, "ep2": EP2, "ep2-tp2": EP2_TP2, **CP}
    one_choice = {"top_k": 1, "normalise": False}  # normalised it is 1, and the gate's gradient rounding alone
    return {
        **idle,
        "one-expert-ep4": EP4.case(sparse(), "none", idle_experts=range(1, 7)),
        "few-experts-fsdp4": FSDP4.case(sparse(2, router=one_choice), "none"),
        "few-experts-odd-width-fsdp4": FSDP4.case(sparse(2, hidden_dim=10), "none"),
        "fewer-experts-than-ranks-fsdp4": FSDP4.case(sparse(6, hidden_dim=10), "none"),
        "fewer-experts-than-ranks-ep2-fsdp2": LayoutCase(4, degrees(expert=2)).case(sparse(2, hidden_dim=10), "none"),
        "odd-ep2": EP2.case(sparse(), "none", length=7, n_rows=6),
        "odd-ep4": EP4.case(sparse(), "selective", length=3, n_rows=4),
        "two-tokens-ep2": EP2.case(sparse(), "full", length=2, n_rows=2, empty_rows=0, mask="causal"),
        "odd-ep2-tp2": EP2_TP2.case(sparse(), "none", length=14, n_rows=6),
        **{f"balance-{name}": ranks.case(balanced, "none") for name, ranks in layouts.items()},
        "balance-full-tp2": TP2.case(balanced, "full"),
        "balance-selective-cp2": CP["cp2"].case(balanced, "selective"),
        "balance-pp2": piped(2, "1F1B").case(balanced, "none"),
        "balance-accumulate-fsdp2-tp2": FSDP2_TP2.case(balanced, "full", local_batch_size=1),
        **{
            f"counted-once-{name}-{mode}": ranks.case(sparse(), mode, local_batch_size=2)
            for name, ranks in {"ep2": EP2, "ep4": EP4, "ep2-tp2": EP2_TP2}.items()
            for mode in ("none", "full", "selective")
        },
    }


def ahead_cases() -> dict[str, Case]:
    """Multi-token prediction, whose blocks use the embedding and the head again."""
    layouts = {"fsdp2": FSDP2, "hsdp2x2": HSDP4, "tp2": TP2, "fsdp2-tp2": FSDP2_TP2, "ep2": EP2, "ep2-tp2": EP2_TP2}
    ahead = sparse(n_mtp_layers=2)
    return {
        **{f"ahead-{name}-{mode}": ranks.case(ahead, mode) for name, ranks in layouts.items() for mode in MODES},
        **{
            f"ahead-accumulate-{name}": ranks.case(ahead, "none", local_batch_size=1) for name, ranks in layouts.items()
        },
        "ahead-tied-tp2": TP2.case(replace(ahead, tie_embeddings=True), "none"),
        "ahead-tied-fsdp2": FSDP2.case(replace(ahead, tie_embeddings=True), "selective"),
        "ahead-odd-tp2": TP2.case(ahead, "none", length=14, n_rows=6),
        "ahead-causal-tp2": TP2.case(ahead, "none", mask="causal"),
        "ahead-dense-tp4": TP4.case(dense(n_mtp_layers=1), "full"),
        "ahead-never-reshard-fsdp2": LayoutCase(2, degrees(fsdp_reshard_after_forward="never")).case(ahead, "none"),
    }


def cut_cases() -> dict[str, Case]:
    """Sizes that ranks do not divide, and ranks that are left without a part of a tensor rank's part."""
    narrow = dense(vocab_size=7, feed_forward=FeedForward.Config(hidden_dim=4), tie_embeddings=True)
    return {
        "uneven-tp4": TP4.case(dense(), "none"),
        "uneven-fsdp2-tp4": LayoutCase(8, degrees(tensor=4)).case(dense(), "none"),
        "uneven-fsdp4-tp2": LayoutCase(8, degrees(tensor=2)).case(dense(vocab_size=61), "none"),
        "narrow-fsdp4": FSDP4.case(dense(vocab_size=3), "none"),
        "narrow-tp4": TP4.case(narrow, "full"),
        "narrow-fsdp2-tp4": LayoutCase(8, degrees(tensor=4)).case(narrow, "none"),
        "tied-fsdp2-tp2": FSDP2_TP2.case(dense(tie_embeddings=True), "selective"),
        "tied-cp2": CP["cp2"].case(dense(tie_embeddings=True), "none"),
        "odd-tp2": TP2.case(dense(), "none", length=14, n_rows=6),
        "odd-cp2": CP["cp2"].case(dense(), "none", length=12, n_rows=3),
        "one-token-each-tp4": TP4.case(dense(), "none", length=4, n_rows=3),
    }


def empty_cases() -> dict[str, Case]:
    """Ranks whose tokens have no label that counts."""
    half = {"empty_rows": 4}
    return {
        "no-label-fsdp4": FSDP4.case(dense(), "full", empty_rows=6),
        "no-label-hsdp4": HSDP4.case(dense(), "none", empty_rows=6),
        "no-label-accumulate": FSDP2.case(dense(), "none", empty_rows=7, local_batch_size=1),
        "no-label-ep4": EP4.case(sparse(), "selective", empty_rows=6),
        "no-label-pp2": piped(2, "1F1B").case(dense(), "none", **half),
        "no-label-pp2-zbv": piped(2, "ZBVZeroBubble").case(dense(n_layers=4), "none", **half),
        "no-label-fsdp2-cp2": LayoutCase(4, degrees(context=2)).case(dense(), "none", **half),
        "no-label-fsdp2-ep4-tp2": LayoutCase(4, degrees(expert=4, tensor=2)).case(sparse(), "full", **half),
        "no-label-ahead-fsdp2-tp2": FSDP2_TP2.case(sparse(n_mtp_layers=1), "none", **half),
    }


def split_cases() -> dict[str, Case]:
    """How a step, the weights and the blocks may be dealt out."""
    four = dense(n_layers=4)
    return {
        "accumulate-hsdp2x2": HSDP4.case(dense(), "selective", local_batch_size=1),
        "accumulate-tp2": TP2.case(dense(), "full", local_batch_size=2),
        "accumulate-cp2": CP["cp2"].case(dense(), "none", local_batch_size=4),
        "accumulate-offload": LayoutCase(2, degrees(cpu_offload=True)).case(dense(), "none", local_batch_size=2),
        "accumulate-pp2": piped(2, "1F1B").case(dense(), "none", local_batch_size=4),
        "accumulate-fsdp2-pp2": piped(4, "Interleaved1F1B").case(dense(), "none", local_batch_size=2),
        "offload-ep2-tp2": LayoutCase(2, degrees(expert=2, tensor=2, cpu_offload=True)).case(sparse(), "none"),
        "offload-fsdp2-tp2": LayoutCase(4, degrees(tensor=2, cpu_offload=True)).case(dense(), "none"),
        "never-reshard-fsdp2": LayoutCase(2, degrees(fsdp_reshard_after_forward="never")).case(dense(), "selective"),
        "always-reshard-fsdp2-pp2": piped(4, "1F1B", fsdp_reshard_after_forward="always").case(dense(), "full"),
        "empty-ends-pp2": piped(2, "Interleaved1F1B").case(dense(), "none"),
        "two-rows-pp2": piped(2, "GPipe", pipeline_parallel_microbatch_size=2).case(four, "selective"),
        "three-each-pp2": piped(2, "LoopedBFS", pipeline_parallel_layers_per_stage=1).case(four, "none"),
        "split-pp2": piped(2, "1F1B", pipeline_parallel_split=[1]).case(four, "full"),
        "split-all-first-pp2": piped(2, "1F1B", pipeline_parallel_split=[4]).case(four, "none"),
        "split-loop-pp2": piped(2, "Interleaved1F1B", pipeline_parallel_split=[0, 3, 4]).case(four, "none"),
        "hsdp2-pp2": LayoutCase(4, degrees(pipeline=2, replicate=2)).case(four, "none"),
        "pp4": LayoutCase(4, degrees(pipeline=4)).case(four, "none"),
        "pp4-interleaved": LayoutCase(4, degrees(pipeline=4, schedule="Interleaved1F1B")).case(
            dense(n_layers=6), "selective"
        ),
        "pp4-zbv": LayoutCase(4, degrees(pipeline=4, schedule="ZBVZeroBubble")).case(dense(n_layers=6), "full"),
    }


MODES = ("none", "full", "selective")
GROUPS = {
    "attention": attention_cases(),
    "experts": expert_cases(),
    "ahead": ahead_cases(),
    "cuts": cut_cases(),
    "empty": empty_cases(),
    "splits": split_cases(),
}
FEW = [
    "cp2-window-sinks-document",
    "cp2-alltoall-window-sinks-causal",
    "idle-ep2-selective-0",
    "idle-ep4-none-6",
    "few-experts-odd-width-fsdp4",
    "odd-ep2-tp2",
    "balance-cp2-tp2",
    "ahead-tp2-full",
    "ahead-ep2-selective",
    "ahead-tied-tp2",
    "uneven-tp4",
    "narrow-tp4",
    "no-label-fsdp2-ep4-tp2",
    "no-label-pp2-zbv",
    "accumulate-hsdp2x2",
    "accumulate-fsdp2-pp2",
    "offload-ep2-tp2",
]
"""The cases that every test run does."""
