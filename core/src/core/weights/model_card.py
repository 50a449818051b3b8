"""The README.md of an exported folder, a model card at Hugging Face: what the model is, and how it came to be."""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from core.checkpoint.find import Found
from core.checkpoint.manifest import Manifest
from core.config.fields import members
from core.runtime.records import read_records

CARD = "README.md"
HEAD = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- armature\n---\n"
"""What the hub reads."""
DATA_KEYS = {"dataset", "path"}
"""Settings of data that name what is read."""


def model_card(name: str, n_parameters: int, dtype: str, source: Path | Found, stated: Mapping[str, Any]) -> str:
    """The card of a model, exported from a folder or a checkpoint with this configuration, which is that of its run or
    just of the model. Places on the machine that trained are named by their last part alone."""
    facts = [("model", name), ("parameters", f"{n_parameters:,}"), ("weights", dtype)]
    if isinstance(source, Found):
        facts += training_facts(source.manifest, stated, last_loss(source))
    table = "".join(f"| {what} | {value} |\n" for what, value in facts)
    body = f"# {name}\n\nMade with Armature. The folder opens with `transformers`, `lm_eval` and vLLM.\n\n"
    return f"{HEAD}\n{body}| | |\n|---|---|\n{table}"


def training_facts(manifest: Manifest, stated: Mapping[str, Any], loss: float | None) -> Iterator[tuple[str, str]]:
    """What the run did, as rows of a table."""
    progress = manifest.progress
    training = stated.get("training")
    if isinstance(training, dict):
        yield "recipe", str(stated.get("recipe") or "none of a name")
        yield "data", ", ".join(data_names(stated.get("dataloader"))) or "not stated"
        began = (stated.get("checkpoint") or {}).get("initial_load_path")
        if began:
            yield "began with", last_part(began)
        yield "tokenizer", last_part((stated.get("tokenizer") or {}).get("path") or "bundled")
        yield "sequence length", f"{training.get('seq_len'):,}"
    yield "steps", f"{progress.step:,}"
    yield "tokens", f"{progress.tokens:,}"
    if loss is not None:
        yield "training loss", f"{loss:.4f}"
    if progress.validation_loss is not None:
        yield "validation loss", f"{progress.validation_loss:.4f}"
    yield "versions", ", ".join(f"{package} {version}" for package, version in manifest.versions.items())


def data_names(stated: Any, key: str = "") -> list[str]:
    """What the settings of a run's data name, sources of a mixture one by one, each once."""
    if isinstance(stated, dict | list):
        found = [name for inner, value in members(stated).items() for name in data_names(value, inner)]
        return list(dict.fromkeys(found))
    return [last_part(stated)] if key in DATA_KEYS and isinstance(stated, str) and stated else []


def last_part(place: str) -> str:
    """The last part of a path; a name of another kind, such as hf:NAME, is itself."""
    return PurePath(place).name if PurePath(place).is_absolute() or place.startswith("~") else place


def last_loss(found: Found) -> float | None:
    """The training loss that the run of a checkpoint recorded last before it was saved."""
    if not found.storage.is_local:
        return None
    folder = Path(found.storage.root)
    records = next((records for place in (folder, folder.parent) if (records := read_records(place))), [])
    losses = [record.get("loss") for record in records if record["step"] <= found.manifest.progress.step]
    return float(losses[-1]) if losses and isinstance(losses[-1], int | float) else None
