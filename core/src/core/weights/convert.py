"""The command of every model package that turns weights of Hugging Face into ours, and back, and those of other
programs into ours: python -m <model>.convert.

Tensor by tensor: no more than the files that are written, one at a time, is in memory.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from core.checkpoint.find import Found
from core.config.completion import SHELLS, Program, Taken, script
from core.config.configurable import owner_of
from core.config.decode import trusted
from core.config.errors import UserError
from core.config.exit import exit_plainly
from core.config.help import PRINT_COMPLETION, VERSION, show
from core.config.recipe import load_config
from core.config.record import to_json
from core.config.validate import validate
from core.config.version import version_lines
from core.runtime.meta import meta_model
from core.weights.adapters import MergedWeights, SavedAdapters
from core.weights.atomic_folder import atomic_folder, vacant
from core.weights.companions import companions_for_others, published_companions, tokenizer_files, write_companions
from core.weights.export import dtypes, outputs
from core.weights.files import write_files
from core.weights.folder import hf_config, is_published, merged_peft, own_config, read_config, with_base
from core.weights.hf import largest_dtype, write_hf_config
from core.weights.hf_model import HFModel, StoredModel, with_hf
from core.weights.key_map import hf_key_map, own_key_map
from core.weights.model_card import CARD, model_card
from core.weights.mxfp4 import in_mxfp4, quantization_config
from core.weights.peer_run import write_run
from core.weights.peers import PEERS, peer_source
from core.weights.peft_export import write_peft
from core.weights.peft_folder import describing, is_peft
from core.weights.saved import newest
from core.weights.shard_file import FileSpan, Output, stretches
from core.weights.source import WeightSource

WAYS = ("from-hf", "to-hf", *(f"from-{peer}" for peer in PEERS))
CAST_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROGRAM = Program(
    Taken(WAYS, most=3, files=True),
    {
        "--dtype": Taken(tuple(CAST_DTYPES)),
        "--shard-gib": Taken(),
        "--trust": Taken(),
        "--config": Taken(files=True),
        "--with-optimizer": Taken(most=0),
        "--ema": Taken(most=0),
        "--peft": Taken(most=0),
        "--mxfp4": Taken(most=0),
        "--version": Taken(most=0),
        "--print-completion": Taken(SHELLS),
        "--help": Taken(most=0),
    },
)
"""What a shell completes."""


def main(families: Mapping[str, type[HFModel]], argv: Sequence[str] | None = None) -> None:
    """The command line: from-hf SRC DST, to-hf SRC DST, or from-dcp SRC DST --config RECIPE and its like.

    `families` has the package's models by their `model_type`, its module `configs` the recipes.

    A mistake of the user ends the program with code 2 and a line that says what to do; nothing stands at DST then.
    """
    parser = argparse.ArgumentParser(description=f"Convert weights of {', '.join(families)}, both ways.")
    ways = "out of Hugging Face's form into ours, or back; or out of that of torchtitan (dcp) or another program"
    parser.add_argument("way", choices=WAYS, help=ways)
    parser.add_argument("src", type=Path, help="the folder to read")
    parser.add_argument("dst", type=Path, help="the folder to write; it must be empty or not exist")
    parser.add_argument(
        "--dtype", choices=CAST_DTYPES, help="cast the weights (default: as stored; bfloat16 for fewer bits)"
    )
    parser.add_argument("--config", nargs="+", help="what the model is, where another program's folder does not say it")
    with_optimizer = "from-dcp: the state of AdamW and the step as well, as the checkpoint of a run"
    parser.add_argument("--with-optimizer", action="store_true", help=with_optimizer)
    parser.add_argument("--ema", action="store_true", help="to-hf: the means of the weights over steps of a checkpoint")
    parser.add_argument("--peft", action="store_true", help="to-hf: the adapters of a run alone, as peft keeps them")
    parser.add_argument("--mxfp4", action="store_true", help="to-hf: experts in 4 bits, as GPT-OSS is published")
    parser.add_argument("--shard-gib", type=float, default=5.0, help="most GiB in a file, and in memory (default: 5)")
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help="let a config.json name classes of this module, which is imported",
    )
    package = next(iter(families.values())).__module__.partition(".")[0]
    parser.add_argument("--version", action=Answer, nargs=0, const=lambda _: version_lines(package), help=VERSION.doc)
    completion, shells = partial(script, program=PROGRAM), PRINT_COMPLETION.metavar
    parser.add_argument(
        "--print-completion", action=Answer, metavar=shells, const=completion, help=PRINT_COMPLETION.doc
    )
    with exit_plainly():
        asked = parser.parse_args(argv)
        for family in families.values():
            with_hf(family)
        if not asked.shard_gib > 0:
            raise UserError(f"--shard-gib {asked.shard_gib} must be above 0")
        dst, trust = vacant(asked.dst), trusted(asked.trust)
        peer = asked.way.removeprefix("from-")
        if (peer in PEERS) != (asked.config is not None):
            raise UserError(f"{asked.way} {'needs' if peer in PEERS else 'takes no'} --config")
        if asked.with_optimizer and peer != "dcp":
            raise UserError(f"--with-optimizer is for from-dcp, not for {asked.way}")
        if asked.ema and asked.way != "to-hf":
            raise UserError(f"--ema is for to-hf, not for {asked.way}")
        if asked.peft and (asked.way != "to-hf" or asked.ema):
            raise UserError("--peft is for to-hf, without --ema")
        if asked.mxfp4 and (asked.way != "to-hf" or asked.peft):
            raise UserError("--mxfp4 is for to-hf, without --peft")
        publish = partial(to_hf, trust=trust, ema=asked.ema, peft=asked.peft, mxfp4=asked.mxfp4)
        convert: Any = {"from-hf": partial(from_hf, trust=trust), "to-hf": publish}.get(asked.way)
        if convert is None:
            config = load_config(asked.config, import_module(f"{package}.configs"), trust=trust)
            convert = partial(from_peer, peer=peer, config=config, with_optimizer=asked.with_optimizer)
        convert(families, asked.src, dst, dtype=CAST_DTYPES.get(asked.dtype), shard_gib=asked.shard_gib)


class Answer(argparse.Action):
    """Prints what its `const` says to the word behind the option, and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        show(self.const(values))
        parser.exit()


def from_hf(
    families: Mapping[str, type[HFModel]],
    src: Path,
    dst: Path,
    *,
    dtype: torch.dtype | None,
    shard_gib: float,
    trust: Sequence[str],
) -> None:
    """Write the weights of a Hugging Face folder as a folder in our format; of one of peft's, its adapters merged into
    the folder that it names, of either kind."""
    place = newest(describing(src)) if is_peft(src) else src
    if is_peft(src) and not is_published(place):
        config = own_config(families, place, trust)
    else:
        stated = read_config(place)
        family = families.get(str(stated.get("model_type")))
        if family is None:
            found = f"model_type {stated['model_type']}" if "model_type" in stated else "no model_type"
            raise UserError(f"{place}/config.json states {found}, not {' or '.join(families)}")
        config = hf_config(family, describing(src), say)
    validate(config)
    model = meta_model(config)
    source = merged_peft(model, src) if is_peft(src) else WeightSource(hf_key_map(model), src)
    write_as_own(model, source, src, dst, dtype=dtype, shard_gib=shard_gib)


def from_peer(
    families: Mapping[str, type[HFModel]],
    src: Path,
    dst: Path,
    *,
    peer: str,
    config: Any,
    with_optimizer: bool,
    dtype: torch.dtype | None,
    shard_gib: float,
) -> None:
    """Write the weights of a folder that another program wrote as a folder in our format, or with what its optimizer
    keeps as that of a run. `config` is that of a run, or of a model."""
    stated = getattr(config, "model", config)
    family = owner_of(type(stated))
    if family not in families.values():
        raise UserError(f"--config is no model of {', '.join(families)}")
    model, source = peer_source(peer, family, stated, src, say)
    if with_optimizer:
        with atomic_folder(dst) as folder:
            return write_run(model, source, config, folder, say)
    write_as_own(model, source, src, dst, dtype=dtype, shard_gib=shard_gib)


def write_as_own(
    model: StoredModel, source: WeightSource, src: Path, dst: Path, *, dtype: torch.dtype | None, shard_gib: float
) -> None:
    """Write the weights of a model, which needs no memory, as a folder in our format that is there whole or not at all,
    and what goes along with them at `src`."""
    key_map = own_key_map(model)
    types = dtypes(model, key_map, {name: source.dtype(name) for name in source.pieces}, dtype)
    made = []
    for name, kind in types.items():
        shape = list(key_map.weights[name].shape)
        made.append(Output(name, shape, kind, partial(new, source, name, shape, kind)))
    with atomic_folder(dst) as folder:
        write_files(folder, made, shard_gib, say)
        (folder / "config.json").write_text(to_json(model.config))
        companions = published_companions(src)
        write_companions(companions, folder)
        for name in companions:
            say(f"{name}: copied")


def to_hf(
    families: Mapping[str, type[HFModel]],
    src: Path,
    dst: Path,
    *,
    dtype: torch.dtype | None,
    shard_gib: float,
    trust: Sequence[str],
    ema: bool = False,
    peft: bool = False,
    mxfp4: bool = False,
) -> None:
    """Write the weights of a folder in our format, or of the newest checkpoint of a run, as a Hugging Face folder; with
    `ema` their means over steps, with `peft` its adapters alone, with `mxfp4` the experts in 4 bits."""
    place = newest(src)
    if ema:
        if not isinstance(place, Found):
            raise UserError(f"--ema: {place} is no checkpoint of a run, which alone has means of weights")
        place = place.averaged()
    config = own_config(families, place, trust)
    validate(config)
    model = meta_model(config)
    weights = with_base(model, place) if peft else None
    adapters = weights.adapters if isinstance(weights, MergedWeights) else None
    if peft and adapters is None:
        raise UserError(f"--peft: {place} is no checkpoint of a run that trains adapters")
    with atomic_folder(dst) as folder:
        if isinstance(weights, MergedWeights) and isinstance(adapters, SavedAdapters):
            base = read_config(place)["checkpoint"]["initial_load_path"]
            base = str(describing(base)) if is_peft(base) else base
            if "://" in base or not is_published(newest(base)):
                say(f"peft reads them beside a Hugging Face folder, which {base} is not: write one with to-hf {base},")
                say("and name it in adapter_config.json, base_model_name_or_path")
            write_peft(model, weights, adapters, base, folder)
            beside, _ = companions_for_others(place, read_config(place), with_hf(model).to_hf_config(), say)
            return write_companions(tokenizer_files(beside), folder)
        write_as_hf(model, place, folder, dtype=dtype, shard_gib=shard_gib, mxfp4=mxfp4, say=say)


def write_as_hf(
    model: StoredModel,
    src: Path | Found,
    dst: Path,
    *,
    dtype: torch.dtype | None,
    shard_gib: float = 5.0,
    mxfp4: bool = False,
    say: Callable[[str], object],
) -> None:
    """Write the weights of a model, which needs no memory, from a folder in our format into one that exists already,
    with all that others expect beside them: a tokenizer, the tokens that end a text, a model card."""
    stated = with_hf(model).to_hf_config()  # raises before a file is written
    source, key_map = WeightSource(own_key_map(model), with_base(model, src)), hf_key_map(model)
    types = dtypes(
        model, key_map, {name: source.dtype(name) for name in source.pieces if name in key_map.places}, dtype
    )
    for name in [name for name in source.pieces if name not in types]:
        say(f"{name} has no place at Hugging Face: left out")
    companions, ids = companions_for_others(src, run := read_config(src), stated, say)
    made = outputs(key_map, types, source.read, source.span)
    if mxfp4:
        made, stated = in_mxfp4(made, key_map), {**stated, "quantization_config": quantization_config()}
    write_files(dst, made, shard_gib, say)
    write_hf_config({**stated, **ids}, made, dst)
    write_companions(companions, dst)
    name, n_parameters = type(model).__name__, sum(weight.numel() for weight in key_map.weights.values())
    card = model_card(name, n_parameters, largest_dtype(made), src, run)
    (dst / CARD).write_text(card)
    for file in (*companions, CARD):
        say(f"{file}: written")


def say(line: str) -> None:
    """Print a line at once, wherever it goes."""
    print(line, flush=True)


def new(source: WeightSource, name: str, shape: list[int], dtype: torch.dtype) -> Iterator[torch.Tensor | FileSpan]:
    """The values of one of our weights, where they stand or in new memory: a stretch of rows at a time where they are
    read so."""
    if (key := source.plain_key(name)) is not None and (span := source.span(key, dtype)) is not None:
        yield span
    elif (block := source.row_block(name)) is not None:
        yield from (source.read_rows(name, rows).to(dtype) for rows in stretches(shape, dtype, block))
    elif shape and source.reads_rows(name):
        for rows in stretches(shape, dtype):
            part = torch.empty([rows.stop - rows.start, *shape[1:]], dtype=dtype)
            yield source.fill(name, part, (rows.start, *[0] * (len(shape) - 1)))
    else:
        yield source.fill(name, torch.empty(shape, dtype=dtype))
