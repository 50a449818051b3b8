"""docs/continue-pretraining.md, word for word: from a tiny folder that transformers wrote to one that it opens."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from core.testing.document import commands, shown_files

DOCUMENT = Path(__file__).parents[3] / "docs/continue-pretraining.md"
TEXT = "The whale swam along the coast, and the ship went after the whale. Nobody saw where the sea began.\n"


def published(folder: Path) -> None:
    """A Qwen3 of a few thousand weights, and a tokenizer of all bytes, as Hugging Face keeps them."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE())
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]
    )
    pieces.train_from_iterator([TEXT], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)


def records(folder: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_document_word_for_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    published(Path("Qwen3-0.6B"))
    Path("books").mkdir()
    for number in range(40):
        Path(f"books/{number:02}.txt").write_text(f"Chapter {number}.\n" + TEXT * 80)
    said = []
    for words in commands(DOCUMENT):
        assert words[:2] == ["python", "-m"]
        monkeypatch.setattr(sys, "argv", words[2:])
        runpy.run_module(words[2], run_name="__main__")
        said.append(capsys.readouterr().out)
    (before,), after = records("runs/before"), records("runs/continued")
    assert before["validation_loss"] == pytest.approx(torch.tensor(512.0).log().item(), rel=0.05)
    assert after[-1]["step"] == 30 and after[-1]["validation_loss"] < before["validation_loss"] - 0.3
    assert len(said) == 7 and said[2].strip() and said[5].strip()
    (ours,) = records("runs/ours")
    assert ours["loss"] == pytest.approx(before["loss"], rel=0.02)
    ((name, program),) = shown_files(DOCUMENT).items()
    Path(name).write_text(program)
    names = runpy.run_path(name)
    assert capsys.readouterr().out.startswith("The whale")
    tokens = names["tokenizer"](TEXT * 8, return_tensors="pt")["input_ids"][:, :256]
    loss = names["model"].float()(tokens, labels=tokens).loss.item()
    assert loss == pytest.approx(after[-1]["validation_loss"], rel=0.02)
