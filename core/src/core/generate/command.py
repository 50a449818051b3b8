"""The command line of generation: `python -m <model>.generate`."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import cast

from core.config import cli
from core.config.decode import trusted
from core.config.errors import UserError
from core.config.exit import exit_plainly
from core.config.fields import Problem
from core.config.help import HELP, MANY, PRINT_COMPLETION, TRUST, VERSION, OwnOption, show, usage
from core.config.options import comparable
from core.config.recipe import is_folder, load_config, recipe_module, recipes
from core.data.tokenizer import Tokenizer
from core.generate.folder import FolderModel, described, end_ids, existing
from core.generate.generate import Completion, generate
from core.generate.printed import PrintedText
from core.generate.sample import Sampler
from core.nn.decoder import Decoder

WRITING_OPTIONS = {
    "config": OwnOption("NAME|FILE.json|FOLDER", "what the model is, if the folder of its weights does not tell", MANY),
    "trust": TRUST,
    "help": HELP,
    "version": VERSION,
    "print_completion": PRINT_COMPLETION,
    "print_config": OwnOption("", "print the resolved settings as JSON, and end", 0),
}
NEEDED = {
    "checkpoint": OwnOption("FOLDER", "the weights: a run, a checkpoint, what convert wrote, or a Hugging Face folder"),
    "prompt": OwnOption("TEXT", "a beginning, or else that of a document; several are continued as one batch"),
}
"""Settings that are explained with those options, because there is no text without them."""


def main(
    configs: str | ModuleType, argv: Sequence[str] | None = None, command: "type[Generation] | None" = None
) -> None:
    """Continue prompts with the model of a folder of weights, or of one of the recipes in `configs`, a module or its
    name; mistakes of the user end as in training. `command` is a `Generation` for other models than core's."""
    command = command or Generation
    with exit_plainly():
        own, settings = cli.own_flags(cli.split_flags(argv), WRITING_OPTIONS)
        if cli.told_version(own, configs):
            return
        configs = recipe_module(configs)
        known = recipes(configs)
        if "print_completion" in own:
            of_recipe = partial(recipe_settings, command, configs=configs, trust=())
            show(cli.completion(own["print_completion"][0], WRITING_OPTIONS, known, lambda name: of_recipe([name])))
            return
        title = "\n".join(
            [
                usage("--checkpoint FOLDER [--prompt TEXT ...]", WRITING_OPTIONS | NEEDED),
                "\nThe text goes to standard output, all else to standard error.",
                f"recipes: {', '.join(known)}",
            ]
        )
        config = chosen_settings(command, own, settings, configs)
        if config is None:
            show(title)
            if "help" not in own:
                raise UserError("choose weights: --checkpoint FOLDER")
            return
        assert isinstance(config, Generation.Config)
        config.prompt, settings = prompts_among(settings)
        heading = title if not own.get("help") else config.checkpoint or " ".join(own.get("config", list(known)[:1]))
        cli.settle_and_run(config, heading, own, settings, WRITING_OPTIONS)


def chosen_settings(
    command: type[FolderModel], own: cli.Own, settings: Sequence[cli.Flag], configs: ModuleType
) -> FolderModel.Config | None:
    """The settings of a command for the model that --config names, or else the folder of --checkpoint; for help about
    settings the first recipe's. None where nothing is chosen."""
    trust = trusted(own.get("trust", []))
    folders = [words[0] for flag, words in settings if comparable(flag) == "checkpoint" and len(words) == 1]
    sources = own.get("config") or ([] if folders or not own.get("help") else list(recipes(configs))[:1])
    if not sources and not folders:
        return None
    folder = folders[-1] if not sources else sources[0] if len(sources) == 1 and is_folder(sources[0], configs) else ""
    if folder:
        model, tokenizer = described(existing(folder), configs, trust, command.models)
        return command.Config(model=model, tokenizer=tokenizer, checkpoint=folder)
    return recipe_settings(command, sources, configs, trust)


def recipe_settings(
    command: type[FolderModel], sources: Sequence[str], configs: ModuleType, trust: Sequence[str]
) -> FolderModel.Config:
    """The settings of a command for the model of a recipe, or of the configuration in a file."""
    recipe = load_config(sources, configs, trust=trust)
    model, tokenizer = (getattr(recipe, name, None) for name in ("model", "tokenizer"))
    if not isinstance(model, command.models) or not isinstance(tokenizer, Tokenizer.Config):
        raise UserError(f"{' '.join(sources)} states no model and no tokenizer: it is not the configuration of a run")
    return command.Config(model=cast(Decoder.Config, model), tokenizer=tokenizer)


def prompts_among(flags: Sequence[cli.Flag]) -> tuple[list[str], list[cli.Flag]]:
    """The texts of all --prompt, and the other options. Raises `UserError` for one that is not one text."""
    prompts, others = [], []
    for flag, words in flags:
        if comparable(flag) != "prompt":
            others.append((flag, words))
        elif len(words) == 1:
            prompts += words
        else:
            raise UserError(f'{flag} takes one text, got {len(words)} words: write {flag} "{" ".join(words) or "..."}"')
    return prompts, others


class Generation(FolderModel):
    """Text that a model writes after prompts."""

    @dataclass(kw_only=True, slots=True)
    class Config(FolderModel.Config):
        prompt: list[str] = field(default_factory=list)
        """Beginnings of texts; on the command line one for each --prompt. Without any a document is begun."""
        prompt_file: str | None = None
        """A UTF-8 file whose text is one prompt more; a line end at its end does not count."""
        chat: bool = False
        """Each prompt is what a user says to open a chat, in the words of the tokenizer's chat template."""
        json: bool = False
        """Print a line of JSON for each prompt when its text ends: number, prompt, text, tokens, ended (or cut off)."""
        max_new_tokens: int = 128
        """Tokens that follow a prompt at most."""
        temperature: float = 1.0
        """Logits are divided by this; 0 always takes the likeliest token."""
        top_k: int | None = None
        """Choose from so many likeliest tokens only."""
        top_p: float = 1.0
        """Choose from the likeliest tokens only whose probabilities reach this sum."""
        seed: int = 0
        """Starts the draws of the first prompt, seed + 1 those of the second, and so on."""

        def problems(self) -> Iterator[Problem]:
            yield from super().problems()
            if self.chat and not self.prompt and self.prompt_file is None:
                yield "prompt", 'nothing to answer: give --prompt "..." or --prompt-file FILE'
            if self.max_new_tokens < 1:
                yield "max_new_tokens", f"max_new_tokens {self.max_new_tokens} must be at least 1"
            if not 0 <= self.temperature < float("inf"):
                yield "temperature", f"temperature {self.temperature} must be finite and not negative; 0 is greedy"
            if self.top_k is not None and self.top_k < 1:
                yield "top_k", f"top_k {self.top_k} must be at least 1, or None for all tokens"
            if not 0 < self.top_p <= 1:
                yield "top_p", f"top_p {self.top_p} must be above 0 and at most 1"
            if not 0 <= self.seed < 2**63:
                yield "seed", f"seed {self.seed} must be from 0 to 2^63 - 1"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        given = [*config.prompt, *([] if config.prompt_file is None else [read_prompt(config.prompt_file)])]
        self.texts = given or [""]
        self.begin: Callable[[str], list[int]] = self.tokenizer.encode_prompt
        if config.chat:
            from core.generate.chat import ChatPrompts  # loads jinja2

            self.begin = ChatPrompts(self.tokenizer)
        self.prompts = [self.encode(text, number) for number, text in enumerate(self.texts, start=1)]
        self.limits = [min(config.max_new_tokens, config.model.max_seq_len - len(ids)) for ids in self.prompts]
        self.end_ids = end_ids(self.tokenizer, self.folder)
        self.model = self.load(ragged=len({len(ids) for ids in self.prompts}) > 1)

    def encode(self, text: str, number: int) -> list[int]:
        """The ids of a prompt, as of the beginning of a document; of a chat, as its template begins it."""
        ids = self.begin(text)
        if not ids:
            raise UserError(f"prompt {number} has no tokens, and this tokenizer none to begin with: write something")
        if len(ids) >= (limit := self.config.model.max_seq_len):
            raise UserError(
                f"prompt {number} has {len(ids):,} tokens, with model.max_seq_len {limit:,} it may have {limit - 1:,}: "
                "shorten it"
            )
        return ids

    def run(self) -> None:
        """Print the continuations as they come, or each as JSON when it ends."""
        for line in self.summary(self.model):
            note(line)
        started = time.perf_counter()
        try:
            completions = self.write()
        except BrokenPipeError:  # the reader has left, as `head` does
            sys.stdout = open(os.devnull, "w")
            return
        except (OSError, UnicodeEncodeError) as error:
            sys.stdout = open(os.devnull, "w")
            fix = "; set PYTHONIOENCODING=utf-8" if isinstance(error, UnicodeEncodeError) else ""
            raise UserError(f"standard output does not take the text: {error}{fix}") from error
        seconds = time.perf_counter() - started
        for line in self.limits_met(completions):
            note(line)
        n_tokens = sum(len(completion.ids) for completion in completions)
        note(f"{n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / seconds:,.0f} tokens/s")

    def write(self) -> list[Completion]:
        """Generate, and print to standard output."""
        c = self.config
        output = PrintedText(self.tokenizer, self.texts, self.prompts, self.limits, as_json=c.json)
        sampler = Sampler(len(self.texts), temperature=c.temperature, top_k=c.top_k, top_p=c.top_p, seed=c.seed)
        return generate(
            self.model,
            self.prompts,
            sampler,
            limits=self.limits,
            n_tokens=self.tokenizer.vocab_size,
            end_ids=self.end_ids,
            emit=output,
            reader=self.cached,
        )

    def limits_met(self, completions: list[Completion]) -> Iterator[str]:
        """What the end of the model's positions cut off."""
        for number, (completion, limit) in enumerate(zip(completions, self.limits, strict=True), start=1):
            if not completion.ended and limit < self.config.max_new_tokens:
                yield (
                    f"prompt {number} ended after {limit:,} of {self.config.max_new_tokens:,} tokens, "
                    f"at model.max_seq_len {self.config.model.max_seq_len:,}"
                )


def read_prompt(file: str) -> str:
    """The text of a file, without the line end at its end. Raises `UserError` where it cannot be read as UTF-8."""
    try:
        return Path(file).expanduser().read_bytes().decode().removesuffix("\n").removesuffix("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt in {file}: {getattr(error, 'strerror', None) or error}") from error


def note(line: str) -> None:
    """Say something that is not the text."""
    print(line, file=sys.stderr, flush=True)
