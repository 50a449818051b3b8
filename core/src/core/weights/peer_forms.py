"""Where other programs keep the weights of a decoder: torchtitan, litgpt, megatron-core and nanotron.

Most families share most names, so a table has more of them than one model has weights.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from core.weights.keys import Half, Heads, Joined, KeyForm, KeyPlace, KeyTable, Stacked

QKV: tuple[tuple[str, Heads], ...] = (("wq", "q"), ("wk", "k"), ("wv", "v"))

TITAN: dict[str, tuple[KeyPlace, ...]] = {
    "output.weight": ("lm_head.weight",),
    **{
        f"layers.{{i}}.attention.{w}.{kind}": (
            f"layers.{{i}}.attention.qkv_linear.{w}.{kind}",
            Joined(f"layers.{{i}}.attention.qkv_linear.wqkv.{kind}", heads=heads, grouped=True),
        )
        for w, heads in QKV
        for kind in ("weight", "bias")
    },
    **{
        f"layers.{{i}}.moe.experts.{w}.weight": (
            f"layers.{{i}}.moe.experts.{w}",
            f"layers.{{i}}.moe.experts.{w}_{axes}",
            f"layers.{{i}}.moe.routed_experts.inner_experts.{w}_{axes}",
        )
        for w, axes in (("w1", "EFD"), ("w2", "EDF"), ("w3", "EFD"))
    },
    "layers.{i}.moe.router.selection_bias": ("layers.{i}.moe.expert_bias", "layers.{i}.moe.expert_bias_E"),
    "ahead.{i}.enorm.weight": ("layers.{i}.enorm.weight",),
    "ahead.{i}.hnorm.weight": ("layers.{i}.hnorm.weight",),
    "ahead.{i}.eh_proj.weight": ("layers.{i}.eh_proj.weight",),
    "ahead.{i}.norm.weight": ("layers.{i}.mtp_norm.weight",),
}
"""What torchtitan has called otherwise, up to 0.3.0; all else goes by our names. Where it computes queries, keys and
values at once, the weights are saved one by one, and what its optimizer keeps of them is not."""


def titan_form(names: Iterable[str], others: Mapping[str, tuple[KeyPlace, ...]] | None = None) -> KeyForm:
    """torchtitan's, for a family with these names of weights; `others` are places that the family alone has."""
    keys: dict[str, tuple[KeyPlace, ...]] = {name: (name, *TITAN.get(name, ())) for name in names}
    ignored = ("optimizer*", "lr_scheduler*", "dataloader*", "train_state*")
    return KeyForm(keys=keys | dict(others or {}), ignored=ignored)


def litgpt_form(halves: frozenset[str] = frozenset()) -> KeyForm:
    """litgpt's `lit_model.pth`: queries, keys and values lie behind one another, and rotate as at Hugging Face."""
    block: dict[str, KeyPlace] = {
        "attention_norm.weight": "norm_1.weight",
        "attention.wo.weight": "attn.proj.weight",
        "attention.wo.bias": "attn.proj.bias",
        "attention.q_norm.weight": "attn.norm_q.weight",
        "attention.k_norm.weight": "attn.norm_k.weight",
        "ffn_norm.weight": "norm_2.weight",
        "feed_forward.w1.weight": "mlp.fc_1.weight",
        "feed_forward.w3.weight": "mlp.fc_2.weight",
        "feed_forward.w2.weight": "mlp.proj.weight",
        "moe.router.gate.weight": "mlp.gate.weight",
        "moe.experts.w1.weight": "mlp.experts.{e}.fc_1.weight",
        "moe.experts.w3.weight": "mlp.experts.{e}.fc_2.weight",
        "moe.experts.w2.weight": "mlp.experts.{e}.proj.weight",
    }
    keys: dict[str, KeyPlace] = {
        "tok_embeddings.weight": "transformer.wte.weight",
        **{f"layers.{{i}}.{name}": f"transformer.h.{{i}}.{place}" for name, place in block.items()},
        **{
            f"layers.{{i}}.attention.{w}.{kind}": Joined(f"transformer.h.{{i}}.attn.qkv.{kind}", heads=heads)
            for w, heads in QKV
            for kind in ("weight", "bias")
        },
        "norm.weight": "transformer.ln_f.weight",
        "output.weight": "lm_head.weight",
    }
    return KeyForm(keys=keys, halves=halves)


MEGATRON_BLOCKS = (
    "decoder.layers.{i}",
    "mtp.layers.{i-n_layers}.transformer_layer",
    "mtp.layers.{i-n_layers}.mtp_model_layer",
)
"""Blocks with a number each; those of multi-token prediction have had two names."""
SINGLE_ENDS = {"first": "_w", "second": "_v"}
"""Ends of the names of halves that lie in tensors of their own."""


def block_places(
    *names: str, heads: Heads | None = None, half: Half | None = None, experts: bool = False
) -> tuple[KeyPlace, ...]:
    """The places of a weight of a block in megatron-core's `torch_dist`: blocks that are all alike lie along an axis of
    their own, others have a number each; experts and halves are one tensor, or (`singleton_local_shards`) each its
    own."""
    rows: dict[str, Any] = {"heads": heads, "grouped": True, "half": half, "experts": experts}
    found: list[KeyPlace] = [Joined(f"decoder.layers.{name}", of_blocks=True, **rows) for name in names]
    for name in (f"{block}.{name}" for block in MEGATRON_BLOCKS for name in names):
        if experts:  # one is read at a time
            one = name.replace("experts.experts.", "experts.experts.{e}.")
            found += [Stacked(name, half), f"{one}{SINGLE_ENDS.get(half or '', '')}"]
        else:
            found += [Joined(name, **rows), *([f"{name}{SINGLE_ENDS[half]}"] if half else [])]
    return tuple(found)


EXPERT_ROWS: tuple[tuple[str, int, Half | None], ...] = (("w1", 1, "first"), ("w3", 1, "second"), ("w2", 2, None))
AHEAD = (("enorm", "enorm"), ("hnorm", "hnorm"), ("eh_proj", "eh_proj"), ("norm", "final_layernorm"))


def megatron_form(
    halves: frozenset[str] = frozenset(), others: Mapping[str, tuple[KeyPlace, ...]] | None = None
) -> KeyForm:
    """megatron-core's `torch_dist`; `others` are places that a family alone has. A norm goes by the name of the linear
    layer behind it where the two are one module. What multi-token prediction has is passed over where the model has
    none."""
    experts, shared = "mlp.experts.experts.linear_fc", "mlp.shared_experts.linear_fc"
    block: dict[str, tuple[KeyPlace, ...]] = {
        "attention_norm.weight": block_places("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        **{f"attention.{w}.weight": block_places("self_attention.linear_qkv.weight", heads=h) for w, h in QKV},
        **{f"attention.{w}.bias": block_places("self_attention.linear_qkv.bias", heads=h) for w, h in QKV},
        "attention.wo.weight": block_places("self_attention.linear_proj.weight"),
        "attention.wo.bias": block_places("self_attention.linear_proj.bias"),
        "attention.q_norm.weight": block_places("self_attention.q_layernorm.weight"),
        "attention.k_norm.weight": block_places("self_attention.k_layernorm.weight"),
        "attention.sinks": block_places("self_attention.core_attention.softmax_offset"),
        "ffn_norm.weight": block_places("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        "feed_forward.w1.weight": block_places("mlp.linear_fc1.weight", half="first"),
        "feed_forward.w3.weight": block_places("mlp.linear_fc1.weight", half="second"),
        "feed_forward.w2.weight": block_places("mlp.linear_fc2.weight"),
        "moe.router.gate.weight": block_places("mlp.router.weight"),
        "moe.router.gate.bias": block_places("mlp.router.bias"),
        "moe.router.selection_bias": block_places("mlp.router.expert_bias"),
        **{
            f"moe.experts.{w}.{kind}": block_places(f"{experts}{layer}.{kind}", half=half, experts=True)
            for w, layer, half in EXPERT_ROWS
            for kind in ("weight", "bias")
        },
        "moe.shared_experts.w1.weight": block_places(f"{shared}1.weight", half="first"),
        "moe.shared_experts.w3.weight": block_places(f"{shared}1.weight", half="second"),
        "moe.shared_experts.w2.weight": block_places(f"{shared}2.weight"),
    } | dict(others or {})
    keys: KeyTable = {
        "tok_embeddings.weight": "embedding.word_embeddings.weight",
        **{f"layers.{{i}}.{name}": places for name, places in block.items()},
        **{f"ahead.{{i}}.{name}.weight": f"mtp.layers.{{i-n_layers}}.{place}.weight" for name, place in AHEAD},
        "norm.weight": "decoder.final_layernorm.weight",
        "output.weight": "output_layer.weight",
    }
    ignored = ("mtp.*", "*_extra_state*", "optimizer*", "chained_*", "rng_state*", "opt_param_scheduler*", "*inv_freq")
    return KeyForm(keys=keys, halves=halves, ignored=ignored)


def nanotron_form() -> KeyForm:
    """nanotron's Llama, which rotates neighbours, as ours does."""
    here = "model.decoder.{i}.pp_block"
    keys: KeyTable = {
        "tok_embeddings.weight": "model.token_position_embeddings.pp_block.token_embedding.weight",
        "layers.{i}.attention_norm.weight": f"{here}.input_layernorm.weight",
        **{f"layers.{{i}}.attention.{w}.weight": Joined(f"{here}.attn.qkv_proj.weight", heads=h) for w, h in QKV},
        "layers.{i}.attention.wo.weight": f"{here}.attn.o_proj.weight",
        "layers.{i}.ffn_norm.weight": f"{here}.post_attention_layernorm.weight",
        "layers.{i}.feed_forward.w1.weight": Joined(f"{here}.mlp.gate_up_proj.weight", half="first"),
        "layers.{i}.feed_forward.w3.weight": Joined(f"{here}.mlp.gate_up_proj.weight", half="second"),
        "layers.{i}.feed_forward.w2.weight": f"{here}.mlp.down_proj.weight",
        "norm.weight": "model.final_layer_norm.pp_block.weight",
        "output.weight": "model.lm_head.pp_block.weight",
    }
    return KeyForm(keys=keys)
