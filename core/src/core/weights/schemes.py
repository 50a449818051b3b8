"""Which ways of storing weights in few bits are not decoded, by the names that their tools have.

Decoded are those that models were published in: blocks of 8 bits (DeepSeek-V3) and MXFP4 (GPT-OSS), see
`core.weights.quantised`.
"""

from collections.abc import Iterable
from typing import Any

from core.config.errors import UserError
from core.config.fields import short_repr

KEY_ENDS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_2": "NVFP4 (ModelOpt)",
    ".weight_scale": "fp8 or int8 with a scale for a tensor or a row (compressed-tensors, ModelOpt)",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
}
"""Ends of keys that a scheme alone has."""
NOT_DECODED = (
    "not decoded here: only fp8 in blocks of 128 x 128 and MXFP4 are; take the folder that was published before it was "
    "quantised"
)


def check_scheme(hf: dict[str, Any]) -> None:
    """Raise `UserError` where a `config.json` states that its weights are quantised in a way that is not decoded."""
    stated = hf.get("quantization_config")
    if not isinstance(stated, dict):
        return
    method = stated.get("quant_method") or ("bitsandbytes" if stated.keys() & {"load_in_4bit", "load_in_8bit"} else "?")
    blocks = stated.get("weight_block_size")
    if method == "mxfp4" or (method == "fp8" and blocks == [128, 128]):
        return
    details = [f"{key} {short_repr(stated[key])}" for key in ("bits", "format", "fmt") if stated.get(key) is not None]
    details += [f"weight_block_size {short_repr(blocks)}"] if method == "fp8" else []
    more = f" ({', '.join(details)})" if details else ""
    raise UserError(f"the weights are quantised by {method}{more}, {NOT_DECODED}")


def check_keys(keys: Iterable[str], place: object) -> None:
    """Raise `UserError` where a stored key is one of a scheme that is not decoded: not every `config.json` says so."""
    for key in keys:
        if scheme := next((name for end, name in KEY_ENDS.items() if key.endswith(end)), None):
            raise UserError(f"{place}: {key} is of weights that are quantised by {scheme}, {NOT_DECODED}")
