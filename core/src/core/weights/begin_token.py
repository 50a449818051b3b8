"""The begin token of a `tokenizer.json`: in front of every text or not, as the run had it that is exported."""

from typing import Any

from core.config.errors import UserError
from core.config.json_file import parse_json
from core.data.tokenizer import MOST_MIB
from core.data.tokenizer_json import begins_with

TEMPLATE = "TemplateProcessing"


def set_begin(content: bytes, bos: int, begins: bool) -> dict[str, Any] | None:
    """What a `tokenizer.json` must hold so that its post-processor puts the token with the id `bos` in front of a text,
    or does not; None where it is so already. Raises `UserError` where that post-processor is of another kind."""
    stated = parse_json(content, "tokenizer.json", MOST_MIB)
    token = next((each["content"] for each in stated.get("added_tokens") or [] if each.get("id") == bos), None)
    if token is None:
        raise UserError(f"tokenizer.json has no special token with the id {bos}")
    steps = steps_of(stated.get("post_processor"))
    if unknown := [step["type"] for step in steps if step["type"] not in (TEMPLATE, "ByteLevel")]:
        raise UserError(f"tokenizer.json begins texts by {unknown[0]}, which cannot be changed")
    templates = [step for step in steps if step["type"] == TEMPLATE]
    found = [template for template in templates if begin_of(template["single"], token)]
    if bool(found) == begins:
        return None
    if not templates:
        steps.append(begins_with(bos, token))
    elif begins:
        first = templates[0]
        first["special_tokens"][token] = {"id": token, "ids": [bos], "tokens": [token]}
        for name in ("single", "pair"):
            first[name].insert(0, {"SpecialToken": {"id": token, "type_id": 0}})
    for template in found:
        for name in ("single", "pair"):
            template[name] = template[name][begin_of(template[name], token) :]
    stated["post_processor"] = steps[0] if len(steps) == 1 else {"type": "Sequence", "processors": steps}
    return stated


def steps_of(post_processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The post-processors that one consists of."""
    if post_processor is None:
        return []
    return list(post_processor["processors"]) if post_processor["type"] == "Sequence" else [post_processor]


def begin_of(template: list[dict[str, Any]], token: str) -> int:
    """How often a token stands in front of what a template wraps: 0 or 1."""
    return int(bool(template) and template[0].get("SpecialToken", {}).get("id") == token)
