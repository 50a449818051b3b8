"""The rotary settings that a Hugging Face `config.json` states, both ways."""

import math
from typing import Any, Literal

from core.config.errors import UserError
from core.nn.rope import RoPE, amplitude


def rope_from_hf(hf: dict, *, layout: Literal["half", "interleaved"]) -> RoPE.Config:
    """The rotary settings of a Hugging Face `config.json`, written by version 4 or 5 of transformers.

    Raises `UserError` for a kind of scaling that this module does not compute, and for a number that is not stated.
    """
    rope = {"rope_theta": hf.get("rope_theta"), **(hf.get("rope_parameters") or hf.get("rope_scaling") or {})}
    config = RoPE.Config(theta=float(_stated(rope, "rope_theta")), layout=layout)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3", "yarn"):
        raise UserError(f'rope type "{kind}" is not supported: only default, llama3 and yarn are')
    part = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1
    if part != 1:
        raise UserError(f"partial_rotary_factor {part} is not supported: only 1 is")
    if kind == "default":
        return config
    config.scaling = "llama" if kind == "llama3" else "yarn"
    config.scaling_factor = float(_stated(rope, "factor"))
    original = rope.get("original_max_position_embeddings") or _stated(hf, "max_position_embeddings")
    config.original_seq_len = int(original)
    if kind == "llama3":
        config.low_freq_factor = float(_stated(rope, "low_freq_factor"))
        config.high_freq_factor = float(_stated(rope, "high_freq_factor"))
        return config
    config.beta_fast = float(rope.get("beta_fast") or 32)
    config.beta_slow = float(rope.get("beta_slow") or 1)
    config.yarn_round = bool(rope.get("truncate", True))
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        config.mscale, config.mscale_all_dim = float(rope["mscale"]), float(rope["mscale_all_dim"])
    stated, ours = rope.get("attention_factor"), amplitude(config)
    if stated is not None and not math.isclose(stated, ours, rel_tol=1e-6):
        raise UserError(f"yarn attention_factor {stated} is not the {ours} that factor and mscale give: not supported")
    return config


def _stated(settings: dict, key: str) -> Any:
    if settings.get(key) is None:
        raise UserError(f"this config.json does not state {key}, which its rotary embedding needs")
    return settings[key]


def rope_to_hf(config: RoPE.Config) -> dict:
    """The rotary settings of a Hugging Face `config.json`, under the names of both version 4 and 5 of transformers."""
    scaling = _scaling_to_hf(config)
    return {
        "rope_parameters": {"rope_theta": config.theta, **(scaling or {"rope_type": "default"})},
        "rope_theta": config.theta,
        "rope_scaling": scaling,
    }


def _scaling_to_hf(config: RoPE.Config) -> dict | None:
    if config.scaling == "none":
        return None
    common = {"factor": config.scaling_factor, "original_max_position_embeddings": config.original_seq_len}
    if config.scaling == "llama":
        low, high = config.low_freq_factor, config.high_freq_factor
        return {"rope_type": "llama3", **common, "low_freq_factor": low, "high_freq_factor": high}
    yarn = {
        "rope_type": "yarn",
        **common,
        "beta_fast": config.beta_fast,
        "beta_slow": config.beta_slow,
        "truncate": config.yarn_round,
        "attention_factor": amplitude(config),
    }
    if config.mscale_all_dim:
        yarn |= {"mscale": config.mscale, "mscale_all_dim": config.mscale_all_dim}
    return yarn
