"""Tokenizers in tiktoken's format, as `tokenizer.json`: a token in base64 and its rank in each line, and nothing else.

How a text is cut into words before its bytes are merged, and which special tokens there are, the file does not say.
Both are known of those that were published, which are told apart by the number of their tokens.
"""

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from core.config.errors import UserError
from core.data.library import library_errors

TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
"""What such a file begins with."""
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX, _REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT_4 = rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_UPPER, _LOWER, _LEAD = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[^\r\n\p{L}\p{N}]?"
_GPT_4O = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_LEAD}{_UPPER}+{_LOWER}*{_SUFFIX}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
)
_LLAMA_3 = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{n}|>" for n in range(3, 248)),
]  # fmt: skip


class Published(NamedTuple):
    """What is known of a published tokenizer."""

    name: str
    pattern: str
    """A word of a text."""
    special: dict[str, int]
    end: str
    """The token that ends a document."""
    begin: str | None = None
    """The token that begins one."""


_END = "<|endoftext|>"
_CL_100K = {_END: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
PUBLISHED = {
    50256: Published("r50k_base", _GPT_2, {_END: 50256}, _END),
    50280: Published("p50k_base", _GPT_2, {_END: 50256}, _END),
    100256: Published("cl100k_base", _GPT_4, {**_CL_100K, "<|endofprompt|>": 100276}, _END),
    128000: Published("Llama 3", _GPT_4, dict(zip(_LLAMA_3, range(128000, 128256), strict=True)), *_LLAMA_3[1::-1]),
    151643: Published(
        "Qwen", _GPT_4.replace("{1,3}", ""), {_END: 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}, _END
    ),
    199998: Published("o200k_base", _GPT_4O, {_END: 199999, "<|endofprompt|>": 200018}, _END),
}
"""By the number of tokens without the special ones."""


def tiktoken_json(content: bytes, name: str) -> tuple[bytes, dict[str, str]]:
    """The `tokenizer.json` of a file in tiktoken's format, and the roles of its special tokens.

    Raises `UserError` for one that is damaged, and for one that is not known.
    """
    ranks = _ranks(content, name)
    known = PUBLISHED.get(len(ranks))
    if known is None:
        numbers = ", ".join(f"{each.name} ({n:,})" for n, each in PUBLISHED.items())
        raise UserError(
            f"{name} has {len(ranks):,} tokens in tiktoken's format, which does not say how a text is cut into words. "
            f"Known by their number are {numbers}. Of others take the tokenizer.json of the model's folder at Hugging "
            "Face, or one that transformers writes from it, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    letters = _letters()
    spelt = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {spelt[token]: rank for token, rank in ranks.items()} | known.special
    merges = [
        (spelt[left], spelt[right])
        for token in ranks
        for left, right in ((token[:n], token[n:]) for n in range(1, len(token)))
        if left in ranks and right in ranks
    ]  # in the order of their ranks, as the tokens are
    roles = {"eos_token": known.end} | ({"bos_token": known.begin} if known.begin else {})
    with library_errors(f"{name} is no tokenizer in tiktoken's format"):
        return _made(vocabulary, merges, known), roles


def _ranks(content: bytes, name: str) -> dict[bytes, int]:
    """The tokens and their ranks, in the order of these."""
    found: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            found[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            if line.strip():
                raise UserError(f"{name}:{number}: expected a token in base64 and its rank") from None
    ranks = sorted(found.values())
    if missing := [byte for byte in range(256) if bytes([byte]) not in found]:
        raise UserError(f"{name} has no token for the byte {missing[0]:#04x}: it is damaged or cut off")
    if len(set(ranks)) != len(ranks):
        raise UserError(f"{name} gives a rank twice: it is damaged")
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _letters() -> list[str]:
    """How `tokenizer.json` writes each byte: printable ones of Latin-1 as they are, the others from U+0100 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def _made(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], known: Published) -> bytes:
    import tokenizers

    cut: Any = tokenizers.pre_tokenizers.Split(tokenizers.Regex(known.pattern), "isolated")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, list(merges), ignore_merges=True))
    bytes_of = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([cut, bytes_of])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(known.special))
    if known.begin is not None:
        begins = [(known.begin, known.special[known.begin])]
        made.post_processor = tokenizers.processors.TemplateProcessing(f"{known.begin} $A", special_tokens=begins)
    return made.to_str().encode()
