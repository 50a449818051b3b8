"""Settings found by words: by their names, by what their documentation says, and by what other programs call them."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

SYNONYMS = {
    "accum": "global_batch_size",
    "amp": "mixed_precision_param",
    "bf16": "bfloat16",
    "ckpt": "checkpoint",
    "clip": "max_norm",
    "continue": "resume initial_load_path",
    "corpus": "dataset",
    "cp": "context_parallel",
    "data": "dataset dataloader",
    "ddp": "data_parallel_replicate",
    "depth": "n_layers",
    "directory": "folder",
    "dp": "data_parallel",
    "ep": "expert_parallel",
    "eval": "validation validator",
    "ffn": "feed_forward",
    "finetune": "initial_load_path",
    "fp16": "dtype mixed_precision_param",
    "fp32": "float32",
    "gpu": "device accelerator",
    "gqa": "n_kv_heads",
    "grad": "max_norm",
    "half": "bfloat16",
    "hang": "timeout",
    "hsdp": "data_parallel_replicate data_parallel_shard",
    "huggingface": "hf",
    "iter": "steps",
    "jit": "compile",
    "length": "seq_len max_seq_len",
    "memory": "activation_checkpoint.mode cpu_offload local_batch_size",
    "momentum": "beta1",
    "nccl": "timeout_seconds",
    "oom": "activation_checkpoint.mode cpu_offload local_batch_size",
    "output": "dump_folder",
    "plan": "dry_run",
    "pp": "pipeline_parallel",
    "precision": "dtype mixed_precision_param",
    "pretrained": "initial_load_path",
    "random": "seed",
    "recompute": "activation_checkpoint.mode",
    "remat": "activation_checkpoint.mode",
    "reproduc": "seed deterministic",
    "restart": "resume",
    "rotary": "rope",
    "sac": "activation_checkpoint",
    "save": "checkpoint.interval",
    "sequence": "seq_len",
    "sliding": "window",
    "speed": "compile",
    "tp": "tensor_parallel",
    "val": "validation",
    "wd": "weight_decay",
    "width": "model.dim",
    "zero": "data_parallel_shard",
}
"""What people and other programs call a thing, or the beginning of it, and the names that it has here."""


class Entry(NamedTuple):
    """Something that can be found: its name, and all that `--help` says of it, the name included."""

    name: str
    text: str


def matches(asked: Sequence[str], entries: Sequence[Entry]) -> list[Entry]:
    """The entries that have most of the words, one at least; those first that have more of them in their names."""
    words = [part for word in asked for part in word_parts(word.lower(), entries)]
    in_text = {entry: sum(bool(pattern(word).search(entry.text)) for word in words) for entry in entries}
    in_name = {entry: sum(bool(pattern(word).search(entry.name)) for word in words) for entry in entries}
    most = max(in_text.values(), default=0)
    return sorted((entry for entry in entries if in_text[entry] == most > 0), key=lambda entry: -in_name[entry])


def word_parts(word: str, entries: Sequence[Entry]) -> list[str]:
    """The word, or where nothing has it as it is, what its underscores separate: `grad_accum` is two words.

    Of those, short ones such as `num` and `per` count only where there is no other.
    """
    if any(pattern(word).search(entry.text) for entry in entries):
        return [word]
    pieces = word.split("_")
    return [piece for piece in pieces if len(piece) > 3] or pieces


@cache
def pattern(word: str) -> re.Pattern[str]:
    """Finds a word and what it is called here: at the beginning of words, or whole ones if it has at most two letters.

    `-`, `_`, `.` and blanks are alike.
    """
    stems = [stem for stem in SYNONYMS if word == stem or len(stem) > 3 and "_" not in word and word.startswith(stem)]
    terms = [word, *(term for stem in stems for term in SYNONYMS[stem].split())]
    spelled = [
        "[-_. ]".join(map(re.escape, re.split("[-_. ]", term))) + ("" if len(term) > 2 else r"(?![a-z0-9])")
        for term in terms
        if term
    ]
    return re.compile(rf"(?<![a-z0-9])(?:{'|'.join(spelled)})" if spelled else "(?!)", re.IGNORECASE)


def vocabulary(entries: Sequence[Entry]) -> Iterator[str]:
    """The words that find something: those in names, and their synonyms."""
    for entry in entries:
        yield from re.split("[-_. ]", entry.name.lstrip("-"))
    yield from SYNONYMS
