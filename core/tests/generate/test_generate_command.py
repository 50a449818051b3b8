"""python -m <model>.generate: from a folder of weights to text on standard output."""

import importlib.resources
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import toy_recipes
from torch import Tensor

from core.checkpoint.settings import Checkpoint
from core.config.configurable import field_names
from core.config.options import field_docs
from core.config.record import to_json
from core.data.text import IndexedText
from core.data.tokenizer import Tokenizer, bundled_model
from core.data.tokenizer_json import read_model, tokenizer_json
from core.generate import command
from core.generate import folder as folder_module
from core.generate.command import main
from core.generate.printed import PrintedText
from core.nn.decoder import Decoder
from core.nn.layers import Linear
from core.runtime.device import describe
from core.runtime.log import log as LOGGER
from core.step.settings import Training
from core.testing.toy import Toy, on_cpu, randomise
from core.weights.convert import main as convert
from core.weights.folder import save_weights
from core.weights.hf import save_hf

BUNDLED = Tokenizer.Config().build()


@torch.no_grad()
def toy(**settings) -> Decoder:
    """A toy with drawn weights to which the end of a text, token 2, is never the likeliest."""
    model = on_cpu(Toy.Config(**{"vocab_size": 2048, **settings}))
    randomise(model, seed=0)
    model.output.weight[2] = 0
    return model.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of the toy, without a tokenizer."""
    folder = tmp_path_factory.mktemp("weights")
    save_hf(toy(), folder)
    return folder


@pytest.fixture(autouse=True)
def no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own: the command starts no log, and what is logged does not go to standard output."""
    monkeypatch.setattr(LOGGER, "handlers", [])
    monkeypatch.setattr(LOGGER, "propagate", True)


@pytest.fixture
def write(weights: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Calls the command with these words, and gives standard output and standard error."""

    def call(*words: str, checkpoint: Path = weights) -> tuple[str, str]:
        main(toy_recipes, ["--config", "toy", "--checkpoint", str(checkpoint), *words])
        return capsys.readouterr()

    return call


@pytest.fixture
def text(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls the command with these words alone, if there are any, and gives standard output."""

    def call(*words: str) -> str:
        if words:
            main(toy_recipes, list(words))
        return capsys.readouterr().out

    return call


@pytest.fixture
def fails(weights: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls the command with these words, which must be a mistake; returns the message."""

    def call(*words: str, checkpoint: Path | None = weights, config: str = "toy") -> str:
        own = ["--config", config] + ([] if checkpoint is None else ["--checkpoint", str(checkpoint)])
        with pytest.raises(SystemExit) as end:
            main(toy_recipes, [*own, *words])
        out, err = capsys.readouterr()
        assert end.value.code == 2 and out == ""
        return err

    return call


@torch.no_grad()
def greedy_ids(prompt: str, n: int) -> list[int]:
    """The likeliest tokens behind a prompt, each from a forward over the whole document so far."""
    start = [1, *BUNDLED.encode(prompt)]
    ids, model = list(start), toy()
    for _ in range(n):
        logits_1LV = model(torch.tensor([ids]))
        assert isinstance(logits_1LV, Tensor)
        ids.append(int(logits_1LV[0, -1].argmax()))
    return ids[len(start) :]


def greedy_text(prompt: str, n: int) -> str:
    """What follows a prompt by the likeliest tokens."""
    return decoded(prompt, greedy_ids(prompt, n))


def decoded(prompt: str, ids: list[int]) -> str:
    """The text of ids that follow a prompt."""
    return BUNDLED.decode(BUNDLED.encode(prompt) + ids)[len(prompt) :]


def test_text_goes_to_standard_output_and_nothing_else(write, weights) -> None:
    out, err = write("--prompt", "def main", "--max-new-tokens", "20", "--temperature", "0")
    assert out == greedy_text("def main", 20) + "\n"
    lines = err.splitlines()
    assert lines[0] == "tokenizer  SentencePiece, 2,048 tokens (bundled)"
    assert lines[1] == (
        f"model      Toy of {sum(w.numel() for w in toy().parameters()):,} parameters from {weights}, "
        f"float32 on {describe(torch.device('cpu'))}"
    )
    assert re.fullmatch(r"20 tokens in [\d.]+ s, [\d,]+ tokens/s", lines[2]) and len(lines) == 3


def test_several_prompts_come_under_headings(write, tmp_path) -> None:
    (tmp_path / "prompt.txt").write_text("a file\nwith 日本語\r\n", newline="")
    words = ["--prompt", "one", "--prompt", "", "--prompt-file", str(tmp_path / "prompt.txt"), "--prompt=--two"]
    out, err = write(*words, "--max-new-tokens", "12", "--temperature", "0")
    prompts = {"one": "one", "": "", "--two": "--two", "a file with 日本語": "a file\nwith 日本語"}
    blocks = [
        f"[{number}] {title}\n{greedy_text(text, 12)}\n\n"
        for number, (title, text) in enumerate(prompts.items(), start=1)
    ]
    assert out == "".join(blocks)
    assert "48 tokens in" in err


def test_several_prompts_stream_in_their_order(monkeypatch) -> None:
    """The second one's text is kept until the first has ended, and then goes on from where it is."""
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    ids = BUNDLED.encode("red blue")
    output = PrintedText(BUNDLED, ["one", "two"], [[1], [1]], [9, 9], as_json=False)
    steps = [(0, ids[0]), (1, ids[0]), (1, ids[1]), (0, None), (1, ids[1]), (1, None)]
    told = []
    for row, token in steps:
        output(row, token)
        told.append(shown.getvalue())
    first, both, again = (BUNDLED.decode(some) for some in (ids[:1], ids[:2], [*ids[:2], ids[1]]))
    beginning = f"[1] one\n{first}"
    assert told[:3] == [beginning] * 3
    assert told[3:] == [f"{beginning}\n\n[2] two\n{text}" for text in (both, again, f"{again}\n\n")]


def test_json(write) -> None:
    out, err = write("--prompt", "日本", "--prompt", "x" * 40, "--max-new-tokens", "60", "--temperature", "0", "--json")
    said = [json.loads(line) for line in out.splitlines()]
    assert sorted(each["number"] for each in said) == [1, 2] and "tokenizer  " in err
    for each in said:
        prompt = {1: "日本", 2: "x" * 40}[each["number"]]
        n = min(60, 64 - 1 - len(BUNDLED.encode(prompt)))
        assert each == {**each, "prompt": prompt, "text": greedy_text(prompt, n), "tokens": n, "ended": False}


def test_long_prompts_have_short_headings(write) -> None:
    out, _ = write(
        "--prompt", "word " * 20, "--prompt", "x " * 60, "--max-new-tokens", "1", "--model.max_seq_len", "200"
    )
    headings = [line for line in out.splitlines() if re.match(r"\[\d\] ", line)]
    assert [len(line) <= 104 for line in headings] == [True, True] and headings[1].endswith("[...]")


def test_same_seed_same_text(write) -> None:
    def text(*words: str) -> str:
        return write("--prompt", "def", "--max-new-tokens", "30", *words)[0]

    assert text("--seed", "5") == text("--seed", "5") != text("--seed", "6")
    assert text() == text("--seed", "0", "--temperature", "1", "--top-p", "1", "--top-k", "None")
    assert (
        text("--top-k", "1") == text("--temperature", "0") == text("--top-p", "1e-9") == greedy_text("def", 30) + "\n"
    )
    assert text("--top-k", "3") != text() != text("--temperature", "0.5")


def test_a_prompt_of_a_batch_gives_the_text_it_gives_alone(write) -> None:
    words = ["--max-new-tokens", "10"]
    alone, _ = write("--prompt", "while True", "--seed", "8", *words)
    out, _ = write("--prompt", "class A: pass", "--prompt", "while True", "--seed", "7", *words)
    assert f"[2] while True\n{alone}\n" in out


def test_eos_ends_the_text(write, tmp_path) -> None:
    """The end of the text is made a little likelier than a token that comes after some others."""
    model, prompt = toy(), "def main"
    ids = greedy_ids(prompt, 30)
    place = next(i for i, token in enumerate(ids) if i >= 3 and token not in ids[:i])
    with torch.no_grad():
        model.output.weight[2] = 1.001 * model.output.weight[ids[place]]
    save_hf(model, tmp_path)
    out, err = write("--prompt", prompt, "--max-new-tokens", "64", "--temperature", "0", checkpoint=tmp_path)
    assert out == decoded(prompt, ids[:place]) + "\n"
    assert f"\n{place} tokens in" in err and "max_seq_len" not in err


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_every_end_token_that_a_folder_names_ends_the_text(write, tmp_path, name) -> None:
    prompt = "def main"
    ids = greedy_ids(prompt, 30)
    place = next(i for i, token in enumerate(ids) if i >= 3 and token not in ids[:i])
    save_hf(toy(), tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text()) if name == "config.json" else {}
    (tmp_path / name).write_text(json.dumps({**stated, "eos_token_id": [3, ids[place]]}))
    out, _ = write("--prompt", prompt, "--max-new-tokens", "64", "--temperature", "0", checkpoint=tmp_path)
    assert out == decoded(prompt, ids[:place]) + "\n"


def test_an_end_token_that_is_none(fails, tmp_path) -> None:
    save_hf(toy(), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    message = fails("--prompt", "x", checkpoint=tmp_path)
    assert f"{tmp_path}/generation_config.json: eos_token_id: " in message


def test_a_tokenizer_that_a_relative_path_led_to_from_elsewhere(fails, tmp_path) -> None:
    """Of runs before paths were absolute: what is wrong is the path, not the tokenizer that stands in for another."""
    config = toy_recipes.toy()
    config.tokenizer.path = "books/tokenizer.model"
    (tmp_path / "config.json").write_text(to_json(config))
    message = fails("--prompt", "x", config=str(tmp_path / "config.json"))
    assert f"there is no tokenizer {Path.cwd()}/books/tokenizer.model: give the place where it is" in message
    save_weights(toy(), tmp_path)
    (tmp_path / "config.json").write_text(to_json(config))
    assert message == fails("--prompt", "x", config=str(tmp_path), checkpoint=tmp_path)


def test_the_end_of_the_positions_ends_the_text_with_a_note(write) -> None:
    prompt = "def main"
    n = 64 - 1 - len(BUNDLED.encode(prompt))
    out, err = write("--prompt", prompt, "--prompt", "x", "--max-new-tokens", "62", "--temperature", "0")
    assert f"[1] {prompt}\n{greedy_text(prompt, n)}\n" in out
    assert f"prompt 1 ended after {n} of 62 tokens, at model.max_seq_len 64\n" in err and "prompt 2" not in err


def test_weights_in_a_folder_of_ours(write, tmp_path) -> None:
    save_weights(toy(), tmp_path)
    out, _ = write("--prompt", "x", "--max-new-tokens", "9", "--temperature", "0", checkpoint=tmp_path)
    assert out == greedy_text("x", 9) + "\n"


def test_weights_of_a_run(write, text, tmp_path) -> None:
    """Of a run the newest checkpoint, or the one that is named; the same text as from what `to-hf` makes of it."""
    config = toy_recipes.toy()
    (tmp_path / "text.txt").write_text("one two three four five\n" * 200)
    config.dump_folder = str(tmp_path / "run")
    config.dataloader = IndexedText.Config(
        dataset=str(tmp_path / "text.txt"), cache_folder=str(tmp_path / "cache"), validation_fraction=0.0
    )
    config.training = Training(steps=2, seq_len=16, local_batch_size=2, device="cpu")
    config.optimizer.lr, config.lr_scheduler.warmup_steps = 0.1, 1
    config.checkpoint = Checkpoint(enable=True, interval=1)
    config.build().run()
    convert({"toy": Toy}, ["to-hf", str(tmp_path / "run"), str(tmp_path / "hf")])
    words, folder = ["--prompt", "one", "--max-new-tokens", "12", "--seed", "1"], tmp_path / "run/checkpoint"
    write(*words)  # and with it what the run has said
    places = (tmp_path / "run", folder, folder / "step-2", tmp_path / "hf", folder / "step-1")
    *newest, before = (write(*words, checkpoint=place)[0] for place in places)
    assert len(set(newest)) == 1 and before != newest[0]
    for place in places[:4]:  # each says itself which model it has
        assert [text(option, str(place), *words) for option in ("--checkpoint", "--config")] == newest[:1] * 2
    assert text("--config", str(places[0]), "--checkpoint", str(places[4]), *words) == before
    config.checkpoint.folder, config.dump_folder = "elsewhere", str(tmp_path / "other")
    config.build().run()
    text()  # what the run has said
    assert text("--checkpoint", str(tmp_path / "other"), *words) == newest[0]


def test_a_run_that_moved_has_its_tokenizer_and_what_it_began_with(capsys, tmp_path) -> None:
    """What lay beside the tokenizer is in every checkpoint, and in what is exported of it."""
    tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")
    base, config = tmp_path / "base", toy_recipes.toy()
    base.mkdir()
    made = tokenizers.Tokenizer.from_str(tokenizer_json(read_model(bundled_model()), 1))
    made.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (base / "LICENSE").write_text("terms")
    save_hf(toy(), base)
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 9], "top_k": 5}')
    (tmp_path / "text.txt").write_text("one two three four five\n" * 200)
    config.dump_folder, config.tokenizer.path = str(tmp_path / "run"), str(base / "tokenizer.json")
    config.dataloader = IndexedText.Config(
        dataset=str(tmp_path / "text.txt"), cache_folder=str(tmp_path / "cache"), validation_fraction=0.0
    )
    config.training = Training(steps=1, seq_len=16, local_batch_size=2, device="cpu")
    config.checkpoint = Checkpoint(enable=True, initial_load_path=str(base), initial_load_in_hf=True)
    config.build().run()
    moved, left = tmp_path / "moved", {file.name: file.read_bytes() for file in base.iterdir()}
    (tmp_path / "run").rename(moved), shutil.rmtree(base)
    inside = {file.name: file.read_bytes() for file in (moved / "checkpoint/step-1/companions").iterdir()}
    kept = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "generation_config.json"}
    assert inside == {name: left[name] for name in kept}
    convert({"toy": Toy}, ["to-hf", str(moved), str(tmp_path / "hf")])
    exported = {file.name: file.read_bytes() for file in (tmp_path / "hf").iterdir()}
    stated = {"bos_token_id": 1, "eos_token_id": [2, 9]}
    assert json.loads(exported["generation_config.json"]) == {"top_k": 5, **stated}
    assert stated.items() < json.loads(exported["config.json"]).items()
    assert {name: exported[name] for name in kept - {"generation_config.json"}}.items() < inside.items()
    card = exported["README.md"].decode()
    facts = (
        "| data | text.txt |",
        "| began with | base |",
        "| tokens | 32 |",
        "| training loss | ",
        f"torch {torch.__version__}",
    )
    assert all(fact in card for fact in facts) and str(tmp_path) not in card
    main(toy_recipes, ["--checkpoint", str(moved), "--prompt", "one", "--max-new-tokens", "3"])
    assert f"({moved}/checkpoint/step-1/companions/tokenizer.json), that of the checkpoint\n" in capsys.readouterr().err


def test_tokenizer_of_the_checkpoint_goes_before_the_recipes(write, tmp_path) -> None:
    import sentencepiece

    save_hf(toy(), tmp_path)
    (tmp_path / "text").write_text("Some text to train on, with words.\n" * 20)
    own, other = tmp_path / "tokenizer.model", tmp_path / "other.model"
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=290, byte_fallback=True,
        minloglevel=2, model_type="bpe",
    )  # fmt: skip
    _, err = write("--prompt", "x", "--max-new-tokens", "1", checkpoint=tmp_path)
    assert err.splitlines()[0] == f"tokenizer  SentencePiece, 290 tokens ({own}), that of the checkpoint"
    other.write_bytes((importlib.resources.files("core.data") / "tokenizer.model").read_bytes())
    _, err = write("--prompt", "x", "--max-new-tokens", "1", "--tokenizer.path", str(other), checkpoint=tmp_path)
    assert err.splitlines()[0] == f"tokenizer  SentencePiece, 2,048 tokens ({other})"


def test_tokenizer_json_of_the_checkpoint_and_a_prompt_without_bos(write, fails, tmp_path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")
    save_hf(toy(), tmp_path)
    bytes_alone = tokenizers.Tokenizer(tokenizers.models.BPE())
    bytes_alone.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=256, show_progress=False)
    bytes_alone.train_from_iterator([""], trainer)
    bytes_alone.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(b"not read")
    out, err = write("--prompt", "日本", "--max-new-tokens", "40", checkpoint=tmp_path)
    assert err.startswith("tokenizer  Hugging Face tokenizer, 256 tokens, none that ends a document (")
    assert f"({tmp_path / 'tokenizer.json'}), that of the checkpoint\n" in err and "40 tokens in" in err
    assert out.endswith("\n")
    message = fails("--prompt", "x", "--prompt", "", checkpoint=tmp_path)
    assert message == "error: prompt 2 has no tokens, and this tokenizer none to begin with: write something\n"


def test_without_a_prompt_a_document_is_begun(write) -> None:
    out, _ = write("--temperature", "0", "--max-new-tokens", "8")
    assert out == greedy_text("", 8) + "\n"


def test_a_folder_without_a_tokenizer_does_not_get_just_any(text, fails, tmp_path) -> None:
    """The bundled one goes with a model of as many rows, and with a run that says so."""
    save_hf(toy(vocab_size=2050), tmp_path / "hf")
    message = fails("--prompt", "x", checkpoint=tmp_path / "hf", config=str(tmp_path / "hf"))
    assert f"{tmp_path / 'hf'} has no tokenizer, and the bundled one of 2,048 tokens is not that" in message
    assert "of 2,050: choose the model's own with --tokenizer.path" in message
    save_weights(toy(vocab_size=2050), tmp_path / "run")
    config = toy_recipes.toy()
    config.model.vocab_size = 2050
    (tmp_path / "run/config.json").write_text(to_json(config))
    assert text("--checkpoint", str(tmp_path / "run"), "--prompt", "x", "--max-new-tokens", "1")


def test_a_folder_of_another_family(fails, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**toy().to_hf_config(), "model_type": "llama"}))
    message = fails("--prompt", "x", checkpoint=tmp_path, config=str(tmp_path))
    assert f"{tmp_path / 'config.json'}: this config.json is not one of toy: model_type is 'llama'" in message
    (tmp_path / "config.json").write_text("{}")
    message = fails("--prompt", "x", checkpoint=tmp_path, config=str(tmp_path))
    assert f"{tmp_path}/config.json describes no model: it states neither a class nor a model_type" in message


def test_config_of_a_run_is_a_recipe_too(weights, capsys, tmp_path) -> None:
    (tmp_path / "config.json").write_text(to_json(toy_recipes.toy()))
    words = ["--checkpoint", str(weights), "--prompt", "x", "--max-new-tokens", "9", "--temperature", "0"]
    main(toy_recipes, ["--config", str(tmp_path / "config.json"), *words])
    assert capsys.readouterr().out == greedy_text("x", 9) + "\n"


def test_text_streams_as_it_comes(write, monkeypatch) -> None:
    """Each piece is flushed before the next token is computed."""

    class Screen(io.StringIO):
        def flush(self) -> None:
            shown.append(self.getvalue())

    shown, screen = [], Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    write("--prompt", "def main", "--max-new-tokens", "10", "--temperature", "0")
    whole = greedy_text("def main", 10) + "\n"
    assert len(shown) > 5 and shown[-1] == whole
    assert all(len(a) < len(b) and whole.startswith(a) for a, b in zip(shown, shown[1:], strict=False))


def test_reader_that_leaves_ends_the_program_quietly(weights, tmp_path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import toy_recipes\nfrom core.generate.command import main\nmain(toy_recipes)\n")
    words = ["--config", "toy", "--checkpoint", str(weights), "--prompt", "x", "--max-new-tokens", "50"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, str(program), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 0 and "Traceback" not in err and "BrokenPipe" not in err
    assert err.count("\n") == 2


class Screen(io.StringIO):
    """Standard output that takes so many pieces, and raises an error for the next one."""

    def __init__(self, n_pieces: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = n_pieces, error

    def write(self, text: str) -> int:
        if not self.left:
            raise self.error
        self.left -= 1
        return super().write(text)


def test_standard_output_that_takes_no_more(fails, monkeypatch) -> None:
    """A full disk, or a screen that cannot show a letter: said once, and not again when the program ends."""
    words = ["--prompt", "def main", "--prompt", "日本語", "--max-new-tokens", "30", "--temperature", "0"]
    full, screen = OSError(28, "No space left on device"), io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for stdout, message in ((Screen(1, full), "[Errno 28] No space left"), (screen, "'ascii' codec can't encode")):
        monkeypatch.setattr(sys, "stdout", stdout)
        assert f"\nerror: standard output does not take the text: {message}" in fails(*words)
        assert sys.stdout is not stdout
        sys.stdout.close()


def test_ctrl_c_keeps_what_is_there(weights, capsys, monkeypatch) -> None:
    screen = Screen(3, KeyboardInterrupt())
    monkeypatch.setattr(sys, "stdout", screen)
    words = ["--prompt", "def main", "--max-new-tokens", "30", "--temperature", "0"]
    with pytest.raises(SystemExit) as end:
        main(toy_recipes, ["--config", "toy", "--checkpoint", str(weights), *words])
    shown = screen.getvalue()
    assert end.value.code == 130 and shown and greedy_text("def main", 30).startswith(shown)
    err = capsys.readouterr().err
    assert err.endswith("\ninterrupted\n") and "Traceback" not in err


def test_help(capsys, weights) -> None:
    main(toy_recipes, ["--help"])
    out = capsys.readouterr().out
    assert "--checkpoint FOLDER" in out and "recipes: toy, no_run" in out
    main(toy_recipes, ["--help", "max-seq-len"])
    assert "  --model.max_seq_len INT" in capsys.readouterr().out
    main(toy_recipes, ["--config", "toy", "--help"])
    out = capsys.readouterr().out
    for part in (
        "--prompt TEXT",
        "--top_p FLOAT = 1.0",
        "--temperature",
        "\ntokenizer: ",
        "--help all ",
    ):
        assert part in out
    assert "--training" not in out
    main(toy_recipes, ["--config", "toy", "--checkpoint", str(weights), "--prompt", "x", "--print-config"])
    assert json.loads(capsys.readouterr().out)["prompt"] == ["x"]


def test_every_setting_is_explained() -> None:
    assert set(field_names(command.Generation.Config)) <= field_docs(command.Generation.Config).keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-0.5"], "temperature: temperature -0.5 must be finite and not negative; 0 is greedy"),
        (["--temperature", "inf"], "temperature: temperature inf must be finite"),
        (["--temperature", "nan"], "temperature: temperature nan must be finite"),
        (["--temperature", "hot"], "--temperature: expected FLOAT, got hot"),
        (["--top-k", "0"], "top_k: top_k 0 must be at least 1, or None for all tokens"),
        (["--top-p", "0"], "top_p: top_p 0.0 must be above 0 and at most 1"),
        (["--top-p", "1.01"], "top_p: top_p 1.01 must be above 0 and at most 1"),
        (["--top-p", "nan"], "top_p: top_p nan must be above 0 and at most 1"),
        (["--max-new-tokens", "0"], "max_new_tokens: max_new_tokens 0 must be at least 1"),
        (["--seed", "-1"], "seed: seed -1 must be from 0 to 2^63 - 1"),
        (["--seed", str(2**63)], "seed: a whole number must be from -2^63 to 2^63 - 1, this one has 64 bits"),
        (["--device", "gpu7"], '"gpu7" is not a device: use auto, cpu or cuda'),
        (["--tok-k", "3"], "no option --tok-k; did you mean --top_k?"),
        (["--training.steps", "3"], "no option --training.steps"),
        (
            ["--prompt", "Once", "upon", "a time"],
            '--prompt takes one text, got 3 words: write --prompt "Once upon a time"',
        ),
        (["--prompt"], '--prompt takes one text, got 0 words: write --prompt "..."'),
        (["--prompt-file", "none.txt"], "cannot read the prompt in none.txt: No such file or directory"),
        (["--prompt", "word " * 90], "with model.max_seq_len 64 it may have 63: shorten it"),
        (["--model.vocab_size", "500"], "the tokenizer has 2,048 tokens, model.vocab_size is 500"),
        (["--model.dim", "32"], "the weights are of a model with\n         dim 16, not 32"),
        (["--model.dim", "32", "--allow-model-change"], "does not fit"),
    ],
)
def test_wrong_settings(fails, words: list[str], message: str) -> None:
    assert message in fails("--prompt", "x", *words)


def test_all_wrong_settings_are_told_at_once(fails) -> None:
    message = fails("--top-p", "2", "--top-k", "-1", "--chat", checkpoint=None)
    assert "checkpoint: no weights: give their folder, --checkpoint FOLDER" in message
    assert 'prompt: nothing to answer: give --prompt "..." or --prompt-file FILE' in message
    assert "top_p 2.0" in message and "top_k -1" in message


def test_prompt_file_that_is_no_text(fails, tmp_path) -> None:
    (tmp_path / "prompt").write_bytes(b"\xff\xfe")
    assert f"cannot read the prompt in {tmp_path / 'prompt'}: 'utf-8' codec" in fails(
        "--prompt-file", str(tmp_path / "prompt")
    )


def test_longest_prompt_that_fits(write, fails) -> None:
    texts = [" x" * n for n in range(1, 64)]
    text = next(text for text in texts if len(BUNDLED.encode(text)) == 62)
    out, err = write("--prompt", text, "--temperature", "0")
    assert out == greedy_text(text, 1) + "\n"
    assert "prompt 1 ended after 1 of 128 tokens" in err
    assert "prompt 1 has 64 tokens, with model.max_seq_len 64 it may have 63" in fails("--prompt", text + " x")


def test_wrong_checkpoints(fails, tmp_path) -> None:
    words = ["--prompt", "x"]
    missing = tmp_path / "missing"
    assert f"there is no folder {missing}: --checkpoint names one with" in fails(*words, checkpoint=missing)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json cannot be read: No such file" in fails(*words, checkpoint=empty)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(to_json(toy_recipes.toy()))
    assert "has no weights, just the config.json of core.testing.toy:Toy" in fails(*words, checkpoint=run)
    (run / "config.json").write_text(json.dumps(toy().to_hf_config()))
    assert "has no model.safetensors" in fails(*words, checkpoint=run)
    (run / "config.json").write_text(json.dumps({**toy().to_hf_config(), "model_type": "llama"}))
    wrong = f"{run / 'config.json'}: this config.json is not one of toy: model_type is 'llama', not 'toy'"
    assert wrong in fails(*words, checkpoint=run)


def test_weights_of_another_shape(fails, tmp_path) -> None:
    save_hf(toy(dim=32), tmp_path)
    message = fails("--prompt", "x", "--allow-model-change", checkpoint=tmp_path)
    assert "does not fit the model" in message and "[2048, 32], the model wants [2048, 16]" in message


def test_model_that_the_memory_cannot_hold(fails, monkeypatch) -> None:
    monkeypatch.setattr(folder_module, "free_memory", lambda device: 1000)
    model = toy()
    moving = max(each.weight.numel() for each in model.modules() if isinstance(each, Linear)) * 4 / 2**10
    n_kib = sum(weight.numel() for weight in model.parameters()) * 4 / 2**10 + moving
    expected = f"the weights take {n_kib:.2f} KiB in float32, of which {moving:.2f} KiB for a moment, cpu has 1,000 byt"
    assert expected in fails("--prompt", "x")


def test_recipes(fails, capsys) -> None:
    assert "no recipe tou; did you mean toy?" in fails("--prompt", "x", config="tou")
    assert "no_run states no model and no tokenizer" in fails("--prompt", "x", config="no_run")
    with pytest.raises(SystemExit):
        main(toy_recipes, [])
    out, err = capsys.readouterr()
    assert "recipes: toy, no_run" in out and err == "error: choose weights: --checkpoint FOLDER\n"


def test_broken_weights(fails, tmp_path) -> None:
    model = toy()
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    save_hf(model, tmp_path)
    message = fails("--prompt", "x", checkpoint=tmp_path)
    assert "error: the model gives logits that are not finite: the weights of this checkpoint are broken" in message
