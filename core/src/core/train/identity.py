"""What the ranks of a run must have in common: settings, packages, code, tokenizer and text."""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from platform import python_version
from types import ModuleType

import torch

from core.config.configurable import Configurable
from core.config.fields import walk
from core.config.record import flatten
from core.data.samples import Samples
from core.data.tokenizer import Tokenizer

MAY_DIFFER = {
    "dump_folder": "the first rank chooses the folder for all",
    "cache_folder": "a machine may keep its tokens where it likes: the tokens are compared",
    "tokenizer.path": "a machine may have a copy of its own: the content is compared",
}
"""Settings that ranks may have of their own, by the ends of their paths, and why."""
WITH_VERSIONS = ("torch", "numpy", "sentencepiece", "tokenizers")
"""Packages that numbers and text pass through; one that this process did not load does not matter."""


def run_facts(config: Configurable.Config, tokenizer: Tokenizer, device: torch.device) -> dict[str, str]:
    """What is known before the text is opened, by name: a few hundred short texts."""
    settings = {path: repr(value) for path, value in flatten(config).items() if not path.endswith(tuple(MAY_DIFFER))}
    packages = {"core", *(type(node).__module__.partition(".")[0] for _, node in walk(config))}
    modules = {name: sys.modules[name] for name in sorted(packages)}
    return {
        **settings,
        "device": device.type,
        "tokenizer": f"{tokenizer.vocab_size:,} tokens, {tokenizer.fingerprint[:16]}",
        **versions(modules),
        **{f"code of {file}": digest for module in modules.values() for file, digest in sources(module).items()},
    }


def text_facts(loaders: Mapping[str, Samples]) -> dict[str, str]:
    """What is known of the text when it is open, by its splits."""
    rows = {split: loader.rows_per_epoch or "endless" for split, loader in loaders.items()}
    return {f"text ({split})": f"{rows[split]} rows, {loader.fingerprint[:16]}" for split, loader in loaders.items()}


def versions(modules: dict[str, ModuleType]) -> dict[str, str]:
    """The versions of Python, of these modules, and of the packages that numbers and text pass through."""
    modules = modules | {name: sys.modules[name] for name in WITH_VERSIONS if name in sys.modules}
    known = {name: str(module.__version__) for name, module in modules.items() if hasattr(module, "__version__")}
    return {f"version of {name}": version for name, version in {"python": python_version(), **known}.items()}


def sources(module: ModuleType) -> dict[str, str]:
    """The hash of every Python file of a package, or of the one file of a module, by a name without the folder."""
    files = {
        f"{module.__name__}/{file.relative_to(folder).as_posix()}": file
        for folder in map(Path, getattr(module, "__path__", []))
        for file in sorted(folder.rglob("*.py"))
    }
    if not files and (file := getattr(module, "__file__", None)):
        files = {Path(file).name: Path(file)}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in files.items()}
