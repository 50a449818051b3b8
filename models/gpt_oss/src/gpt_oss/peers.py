"""GPT-OSS as other programs keep it."""

from core.weights.keys import Half, KeyPlace, Stacked
from core.weights.peer_forms import megatron_form, titan_form
from gpt_oss.hf import KEYS


def experts(leaf: str, axes: str, half: Half | None = None) -> tuple[KeyPlace, ...]:
    """The places of a weight of all experts in what torchtitan has called them."""
    rooms = ("experts", "routed_experts.inner_experts")
    return tuple(Stacked(f"layers.{{i}}.moe.{room}.{leaf}{end}", half) for room in rooms for end in ("", f"_{axes}"))


EXPERTS: dict[str, tuple[KeyPlace, ...]] = {
    "w1.weight": experts("mlp1_weight", "EGD", "even"),
    "w1.bias": experts("mlp1_bias", "EG", "even"),
    "w3.weight": experts("mlp1_weight", "EGD", "odd"),
    "w3.bias": experts("mlp1_bias", "EG", "odd"),
    "w2.weight": experts("mlp2_weight", "EDF"),
    "w2.bias": experts("mlp2_bias", "ED"),
}
FORMS = {
    "dcp": titan_form(KEYS, {f"layers.{{i}}.moe.experts.{name}": places for name, places in EXPERTS.items()}),
    "megatron": megatron_form(),
}
"""megatron-core keeps the gates of experts in front of what they multiply, as for every other family."""
