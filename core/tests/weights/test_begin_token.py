"""The begin token in what is exported, against the package tokenizers."""

import json
from typing import Any

import pytest

from core.weights.companions import complete_companions

BOS, EOS = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}
A, B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def template(single: list[dict[str, Any]]) -> dict[str, Any]:
    special = {token: {"id": token, "ids": [number], "tokens": [token]} for number, token in enumerate(("<s>", "</s>"))}
    named = {piece["SpecialToken"]["id"] for piece in single if "SpecialToken" in piece}
    kept = {token: each for token, each in special.items() if token in named}
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, B], "special_tokens": kept}


FORMS: dict[str, tuple[Any, list[str]]] = {
    "none": (None, []),
    "begin": (template([BOS, A]), ["<s>"]),
    "end": (template([A, EOS]), []),
    "both": (template([BOS, A, EOS]), ["<s>"]),
    "bytes": (BYTES, []),
    "bytes and begin": ({"type": "Sequence", "processors": [BYTES, template([BOS, A])]}, ["<s>"]),
}
"""Post-processors, and what they put in front of a text."""


def exported(post_processor: Any, add_bos: bool | None, said: list[str], **settings: Any) -> dict[str, bytes]:
    """The companions of a tokenizer of two special tokens and one letter."""
    added = [
        {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for number, token in enumerate(("<s>", "</s>"))
    ]
    model = {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "unk_token": "a"}
    stated = {"version": "1.0", "added_tokens": added, "model": model, "post_processor": post_processor}
    config = json.dumps({"bos_token": "<s>", "eos_token": "</s>", **settings}).encode()
    files = {"tokenizer.json": json.dumps(stated).encode(), "tokenizer_config.json": config}
    made, _ = complete_companions(files, max_length=None, add_bos=add_bos, say=said.append)
    if add_bos is None:
        assert all(made[name] == content for name, content in files.items())
    return made


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("form", FORMS)
def test_what_a_run_put_in_front_of_a_text_is_exported(form: str, add_bos: bool | None) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")
    post_processor, begun = FORMS[form]
    made = exported(post_processor, add_bos, said := [])
    found = tokenizers.Tokenizer.from_str(made["tokenizer.json"].decode())
    first = begun if add_bos is None else ["<s>"] * add_bos
    last = ["</s>"] if form in ("end", "both") else []
    assert found.encode("a").tokens == [*first, "a", *last] and not said
    assert found.encode("a", "a").tokens[: len(first) + 1] == [*first, "a"]


def test_the_setting_beside_it_says_the_same() -> None:
    for stated in (True, False):
        made = exported(None, not stated, [], add_bos_token=stated)
        assert json.loads(made["tokenizer_config.json"])["add_bos_token"] is not stated


def test_another_kind_of_tokenizer_stays_and_a_line_says_so() -> None:
    bert = {"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}
    made = exported(bert, False, said := [])
    assert json.loads(made["tokenizer.json"])["post_processor"] == bert
    assert said == [
        "tokenizer.add_bos False is not said to others: tokenizer.json begins texts by BertProcessing, which cannot be "
        "changed"
    ]
