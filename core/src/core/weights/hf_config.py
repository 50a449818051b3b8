"""What stands in a Hugging Face `config.json`, and what every decoder states there."""

from operator import attrgetter
from reprlib import repr as short_repr
from typing import Any

from core.config.errors import OtherFamily, UserError
from core.nn.balance import equal_balance_coeff


class HFConfig(dict[str, Any]):
    """A Hugging Face `config.json`; asking it for a key that it does not state is a `UserError` that names the key."""

    def __getitem__(self, key: str) -> Any:
        if self.get(key) is None:
            raise UserError(f"this config.json does not state {key}")
        return super().__getitem__(key)


def checked_hf_config(hf: dict[str, Any], fixed: dict[str, Any]) -> HFConfig:
    """`hf`, which must agree with `fixed` wherever it states the same key.

    Raises a `UserError` that lists all differences.
    """
    wrong = [
        f"{key} is {short_repr(hf[key])}, not {value!r}" for key, value in fixed.items() if hf.get(key, value) != value
    ]
    if "model_type" not in hf:
        wrong.append("model_type is missing")
    if wrong:
        kind = UserError if hf.get("model_type") == fixed["model_type"] else OtherFamily
        raise kind(f"this config.json is not one of {fixed['model_type']}: " + "; ".join(wrong))
    return HFConfig(hf)


def check_expressible(config: Any, fixed: dict[str, Any], family: str) -> None:
    """Raise a `UserError` that lists all settings which no `config.json` of a family can state.

    They are those at the paths of `fixed` whose value is another than there.
    """
    wrong = [(path, attrgetter(path)(config), value) for path, value in fixed.items()]
    told = [f"{path} is {found!r}, there always {value!r}" for path, found, value in wrong if found != value]
    if told:
        raise UserError(f"a {family} of Hugging Face cannot be this model: " + "; ".join(told))


def balance_advice(config: Any) -> str:
    """What the `router_aux_loss_coef` that a configuration was read from weighs in transformers, and the equal strength
    here; "" where it is 0."""
    coeff, router = config.moe.router.balance_loss_coeff, config.moe.router
    if not coeff:
        return ""
    equal = equal_balance_coeff(coeff, top_k=router.top_k, n_layers=config.n_layers)
    return (
        f"router_aux_loss_coef {coeff:g} weighs another loss in transformers, where output_router_logits adds it: as "
        f"strong as there it is with --model.moe.router.balance_loss_coeff {equal:.3g}"
    )


DECODER_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
"""Hugging Face's names in `config.json` for what every decoder states."""


def decoder_from_hf(hf: HFConfig) -> dict[str, Any]:
    """The fields that every decoder's Config has, out of a Hugging Face `config.json`."""
    return {ours: hf[theirs] for ours, theirs in DECODER_KEYS.items()}


def decoder_to_hf(config: Any) -> dict[str, Any]:
    """What every decoder's Config states in a Hugging Face `config.json`."""
    return {theirs: getattr(config, ours) for ours, theirs in DECODER_KEYS.items()}
