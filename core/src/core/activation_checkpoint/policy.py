"""The one policy: what a checkpointed block saves for backward, and what it computes again.

Backward of a block needs what its forward computed. Keeping all of it takes the most memory; keeping the block's input
alone and running the block again takes a second forward. In between, operations differ: a matrix product or attention
is expensive to repeat for each byte of its output, a norm or an activation nearly free. So `selective` saves the
outputs of expensive operations (`ops.py` has the list) and repeats the rest; of matrix products it saves every second
one, which halves the memory that they take for half of their work. Choices that must not fall otherwise the second
time, such as which experts a token goes to, are saved in every mode.

The policy sees operations as PyTorch dispatches them, so it is one for all models and knows no layer: what a module
wants otherwise it says where it computes (`region.py`). The repeated forward must be what the first was; `replay.py`
records it, compares, and names the module where it is not.
"""

import hashlib
import inspect
import sys
from functools import cache, partial
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from core.activation_checkpoint import ops, region
from core.activation_checkpoint.ops import PRODUCT_WEIGHTS, saved_ops
from core.activation_checkpoint.region import current_mark
from core.activation_checkpoint.replay import Replay, Trace, replay_contexts
from core.activation_checkpoint.save_output import Op

SAVE, RECOMPUTE = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
aten = torch.ops.aten

Shape = tuple[int, int]


class Policy(Protocol):
    """The `context_fn` of `torch.utils.checkpoint.checkpoint`: a fresh pair of modes for each call of a block."""

    cache_hash: str
    """Identifies the decisions across processes, for the caches of torch.compile."""

    def __call__(self) -> Replay: ...


@cache
def default_activation_checkpoint_policy(
    *,
    mode: Literal["selective", "full"] = "selective",
    save_ops: tuple[str, ...] = (),
    recompute_shapes: frozenset[Shape] = frozenset(),
    debug: bool = False,
) -> Policy:
    """The policy of every model: one object for equal arguments, so that equal blocks share one compiled graph.

    For each operation of a block, in this order:

    1. inside `kept()`, or a copy from a device to the host: saved;
    2. in mode "full": computed again;
    3. a matrix product (mm, addmm, linear, first-party ones) inside `recomputed()`, or whose weight has one of
       `recompute_shapes` (in, out): computed again, and not counted;
    4. every second other matrix product of a call of the block: computed again;
    5. on the list of `ops.py`, or one of `save_ops`: saved, unless inside `recomputed()`;
    6. all others: computed again.
    """
    policy = cast(Policy, partial(_contexts, mode, save_ops, recompute_shapes, debug))
    policy.cache_hash = _hash(mode, save_ops, sorted(recompute_shapes))
    return policy


def _contexts(
    mode: Literal["selective", "full"], save_ops: tuple[str, ...], recompute_shapes: frozenset[Shape], debug: bool
) -> Replay:
    """The modes of one call of a block, which count its matrix products from the first.

    The little that "full" keeps is there for a second pass of backward too, as zero-bubble pipelines make.
    """
    saved = saved_ops(save_ops) if mode == "selective" else frozenset()
    n_products = 0

    def decide(context: SelectiveCheckpointContext, op: Op, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        nonlocal n_products
        mark = current_mark()
        if mark == "keep" or is_copy_to_host(op, args, kwargs):
            return SAVE
        if op not in saved or mark == "recompute":
            return RECOMPUTE
        if (shape := weight_shape(op, args)) is not None:
            if shape in recompute_shapes:
                return RECOMPUTE
            n_products += 1
            return SAVE if n_products % 2 else RECOMPUTE
        return SAVE

    return replay_contexts(decide, Trace(debug=debug, once=mode == "selective"))


def weight_shape(op: Op, args: tuple[Any, ...]) -> Shape | None:
    """(in, out) of the right-hand side of a matrix product; None for any other operation."""
    right: Tensor
    if op is aten.mm.default:
        right = args[1]
    elif op is aten.addmm.default:
        right = args[2]
    elif op is aten.linear.default:
        right = args[1].t()
    elif op in PRODUCT_WEIGHTS:
        right = args[PRODUCT_WEIGHTS[op]].t()
    else:
        return None
    return right.shape[0], right.shape[1]


def is_copy_to_host(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation moves a tensor from an accelerator to the CPU: doing it twice would wait twice."""
    target = kwargs.get("device")
    return (
        op is aten._to_copy.default
        and target is not None
        and torch.device(target).type == "cpu"
        and args[0].device.type != "cpu"
    )


def _hash(*settings: object) -> str:
    """A digest of the settings, of what decides, and of torch."""
    sources = [inspect.getsource(module) for module in (sys.modules[__name__], ops, region)]
    text = repr((torch.__version__, settings, sources, sorted(map(str, ops.OURS))))
    return hashlib.sha256(text.encode()).hexdigest()
