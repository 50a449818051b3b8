"""Write what was trained as a folder of transformers: python -m hf_models.convert to-hf RUN FOLDER."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import hf_models.trainer  # noqa: F401 - the classes that a run's config.json names
from core.config.errors import UserError
from core.config.exit import exit_plainly
from core.config.record import from_dict
from core.config.validate import validate
from core.runtime.meta import meta_model
from core.weights.atomic_folder import atomic_folder, vacant
from core.weights.companions import companions_of, complete_companions, read_companions, write_companions
from core.weights.convert import CAST_DTYPES, say
from core.weights.folder import model_of, own_source, read_config
from core.weights.saved import newest
from hf_models.folder import without_memory
from hf_models.model import HFModel


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a mistake of the user ends the program with code 2, and nothing stands at the folder then."""
    parser = argparse.ArgumentParser(description="Write a run's model as transformers keeps it.")
    parser.add_argument("way", choices=["to-hf"], help="out of a run or a checkpoint into a folder of transformers")
    parser.add_argument("src", type=Path, help="the folder of a run, or a checkpoint")
    parser.add_argument("dst", type=Path, help="the folder to write; it must be empty or not exist")
    parser.add_argument("--dtype", choices=CAST_DTYPES, help="cast the weights (default: as stored)")
    asked = parser.parse_args(argv)
    with exit_plainly():
        export(asked.src, vacant(asked.dst), CAST_DTYPES.get(asked.dtype))


def export(src: Path, dst: Path, dtype: torch.dtype | None = None) -> None:
    """Write the newest checkpoint of a run, or this one, by transformers' own `save_pretrained`: the weights under the
    keys of the folder that the run began with, its companions, and the tokenizer of the run."""
    place = newest(src)
    run = read_config(place)
    try:
        config: Any = from_dict(model_of(run), HFModel.Config, trust=["hf_models"])
    except UserError as error:
        raise UserError(f"{place} holds no model of transformers: {error}") from error
    validate(config)
    model: Any = meta_model(config)
    source = own_source(model, place)
    values = {}
    for name in source.pieces:
        kind = dtype if dtype is not None and source.dtype(name).is_floating_point else source.dtype(name)
        values[name] = source.fill(name, torch.empty(source.key_map.weights[name].shape, dtype=kind))
    theirs = without_memory(config.path, config.attention)
    theirs.load_state_dict(values, strict=False, assign=True)
    theirs.tie_weights()
    theirs.config.dtype = next(theirs.parameters()).dtype
    vars(theirs.config).pop("auto_map", None)  # code that the folder named has not made this model, nor is it exported
    files = read_companions(config.path) | companions_of(place, run, say)
    add_bos = run.get("tokenizer", {}).get("add_bos")
    files, ids = complete_companions(files, max_length=config.max_seq_len, add_bos=add_bos, say=say)
    for role, token in ids.items():
        setattr(theirs.config, role, token)
    with atomic_folder(dst) as folder:
        theirs.save_pretrained(folder)
        write_companions(files, folder)
    say(f"{dst}: {len(values)} weights of {type(theirs).__name__}, {', '.join(sorted(files)) or 'no companions'}")


if __name__ == "__main__":
    main()
