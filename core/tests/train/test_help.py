"""What `--help` says of a real run: an overview, a section, and the settings that a word finds."""

import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from core.config import cli
from core.config.fields import walk
from core.config.options import options
from core.config.search import SYNONYMS, pattern
from core.testing.toy import Toy, toy_moe
from core.train.trainer import Trainer


def toy_recipe() -> Trainer.Config:
    """A toy."""
    return Trainer.Config(model=Toy.Config(feed_forward=toy_moe()))


@pytest.fixture
def told(capsys):
    """What `--help` with these words prints about the recipe."""
    configs = ModuleType(toy_recipe.__module__)
    configs.toy_recipe = toy_recipe

    def ask(*words: str, code: int = 0, recipe: tuple[str, ...] = ("--config", "toy_recipe")) -> str:
        if code:
            with pytest.raises(SystemExit) as end:
                cli.main(configs, [*recipe, "--help", *words])
            assert end.value.code == code
        else:
            cli.main(configs, [*recipe, "--help", *words])
        out, err = capsys.readouterr()
        assert not (err if code == 0 else out)
        return out or err

    return ask


def test_completion_knows_every_setting(capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("toy.train", None))
    configs = ModuleType(toy_recipe.__module__)
    configs.toy_recipe = toy_recipe
    cli.main(configs, ["--print-completion", "bash"])
    script = capsys.readouterr().out
    offered = re.search(r"offered='(.*)'", script)[1].split()
    assert [option for option in offered if option.lstrip("-").replace("-", "_") not in cli.RUN_OPTIONS] == [
        f"--{name}" for name in names()
    ]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def names() -> list[str]:
    """The path of every setting, in order."""
    return [option.path for path, node in walk(toy_recipe()) for option in options(node, path)]


def explained(text: str) -> list[str]:
    """The options that a text explains, in its order, without their dashes."""
    return re.findall(r"^  --([\w.-]+)", text, re.MULTILINE)


def test_the_overview_names_every_section_and_setting_and_the_way_to_their_meaning(told):
    text = told()
    title, outside, inside, ways = text.split("\n\n")
    assert title == "toy_recipe" and len(ways.splitlines()) == 3
    listed, section = explained(outside), ""
    for line in inside.splitlines():
        if line.startswith("    "):
            listed += [f"{section}.{name}" for name in line.split()]
        else:
            section = line.partition(":")[0]
    assert listed == names()
    assert max(map(len, inside.splitlines())) < 80
    assert text.endswith(f"--help all       all {len(names())} settings\n")


def test_all_explains_every_setting(told):
    assert explained(told("all")) == names()
    assert "--training.steps INT = 10000\n      Optimizer updates of the run.\n" in told("all")


@pytest.mark.parametrize(
    ("word", "path"),
    [("training", "training"), ("model.attention", "model.attention"), ("lr-scheduler", "lr_scheduler")],
)
def test_a_section(told, word, path):
    assert explained(told(word)) == [name for name in names() if name.rpartition(".")[0] == path]


def test_a_section_holds_those_inside_it_and_names_what_else_is_about_it(told):
    assert explained(told("model")) == [name for name in names() if name.startswith("model.")]
    assert explained(told("router")) == [name for name in names() if name.startswith("model.feed_forward.router.")]
    assert explained(told("run")) == [name for name in names() if "." not in name]
    text = " ".join(told("compile").split())
    assert "Also about compile: " in text and "--activation_checkpoint.mode" in text.partition("Also about")[2]


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("accum", "training.global_batch_size"),
        ("gradient_accumulation_steps", "training.global_batch_size"),
        ("batch", "training.local_batch_size"),
        ("per_device_train_batch_size", "training.local_batch_size"),
        ("BF16", "training.dtype"),
        ("gpu", "training.device"),
        ("lr", "optimizer.lr"),
        ("learning rate", "optimizer.lr"),
        ("learning_rate", "optimizer.lr"),
        ("resume", "checkpoint.resume"),
        ("epochs", "dataloader.epochs"),
        ("clip", "training.max_norm"),
        ("fsdp", "parallelism.data_parallel_shard_degree"),
        ("tp", "parallelism.tensor_parallel_degree"),
        ("oom", "activation_checkpoint.mode"),
        ("training.seq-len", "training.seq_len"),
        ("optimizer.beta", "optimizer.beta1"),
        ("reproducible", "debug.seed"),
        ("dry-run", "dry-run"),
        ("arXiv", "model.n_mtp_layers"),
    ],
)
def test_a_word_finds_settings_by_their_names_synonyms_and_documentation(told, words, first):
    assert first in explained(told(*words.split()))[:3]


def test_more_words_narrow(told):
    assert explained(told("validation", "loss")) == ["checkpoint.keep_best_k"]
    assert set(explained(told("batch", "size"))) < set(explained(told("batch")))


def test_a_word_of_two_letters_is_no_beginning(told):
    found = explained(told("ep"))
    assert "parallelism.expert_parallel_degree" in found and "dataloader.epochs" not in found


def test_a_word_that_finds_nothing_says_so_with_those_that_do(told):
    assert told("warmpu", code=2).startswith("error: no setting about warmpu; did you mean warmup")
    assert told("trainin.steps", code=2) != told("training.steps")
    assert told("qqqq", "zzzz", code=2) == "error: no setting about qqqq zzzz; --help all lists every one\n"


def test_without_a_recipe_the_first_is_asked(told):
    assert explained(told("lr", recipe=())) == explained(told("lr"))
    assert told("lr", recipe=()).startswith("toy_recipe, the first recipe")


@pytest.mark.parametrize("word", SYNONYMS)
def test_every_synonym_leads_to_a_setting_or_option(word):
    entries = [*names(), *cli.RUN_OPTIONS]
    texts = [option.text() for path, node in walk(toy_recipe()) for option in options(node, path)]
    for term in SYNONYMS[word].split():
        assert any(pattern(term).search(text) for text in [*entries, *texts]), f"{term} is nowhere"
    assert word not in entries
