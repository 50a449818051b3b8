"""What a model says of a text, against its whole logits."""

import json
import math
import random
from pathlib import Path

import evaluated_recipes
import pytest
import torch

from core.config.errors import UserError
from core.data.tokenizer import Tokenizer
from core.evaluate import scores
from core.evaluate.command import main
from core.evaluate.perplexity import perplexity_of, windows
from core.evaluate.scores import ScoredRow, batches_by_length, score_rows
from core.generate.generate import Completion, generate
from core.generate.sample import Sampler
from core.nn.decoder import Decoder
from core.testing.toy import Toy, ToyMoE, on_cpu, randomise
from core.weights.folder import save_weights

BUNDLED = Tokenizer.Config().build()
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 3


def drawn(config: Decoder.Config) -> Decoder:
    model = on_cpu(config)
    randomise(model, seed=3)
    return model.eval()


@torch.no_grad()
def alone(model: Decoder, ids: list[int], n: int) -> list[tuple[float, bool]]:
    """The log-probability of each of the last `n` ids, and whether it is the likeliest, from all logits of the row."""
    log_probs_LV = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    asked = list(zip(log_probs_LV, ids[1:], strict=True))[-n:]
    return [(float(log_probs_V[token]), int(log_probs_V.argmax()) == token) for log_probs_V, token in asked]


@pytest.mark.parametrize("config", [Toy.Config(), ToyMoE.Config(n_layers=3)], ids=["dense", "experts"])
def test_scores_are_those_of_whole_logits(config, monkeypatch):
    monkeypatch.setattr(scores, "MOST_LOGITS", 5 * config.vocab_size)
    model, draw = drawn(config), random.Random(0)
    rows = [ScoredRow([draw.randrange(64) for _ in range(n + draw.randint(1, 20))], n) for n in (1, 3, 40, 1, 7)]
    likeliest = generate(model, [[5, 6]], Sampler(1, temperature=0.0), limits=[4], n_tokens=64)[0].ids
    rows.append(ScoredRow([5, 6, *likeliest], 4))
    each = [alone(model, list(row.ids), row.n) for row in rows]
    for batch_tokens in (1, 100, 10_000):
        for expected, score in zip(each, score_rows(model, rows, batch_tokens=batch_tokens), strict=True):
            assert score.log_probs == pytest.approx([log_prob for log_prob, _ in expected], abs=2e-6)
            assert score.greedy == all(greedy for _, greedy in expected)
    assert score.greedy


def test_batches_hold_rows_of_like_length():
    lengths = [3, 9, 4, 4, 1, 10]
    batches = list(batches_by_length(lengths, 20))
    assert batches == [[5, 1], [2, 3, 0, 4]]
    assert all(len(batch) * max(lengths[i] for i in batch) <= 20 for batch in batches)
    assert list(batches_by_length([50, 60], 20)) == [[1], [0]] and list(batches_by_length([], 20)) == []


@pytest.mark.parametrize("n_ids, seq_len, stride", [(30, 8, 3), (9, 8, 8), (8, 8, 2), (2, 8, 1), (30, 1, 1)])
def test_every_token_is_predicted_once_behind_enough_others(n_ids, seq_len, stride):
    asked = []
    for place, row in enumerate(windows(list(range(n_ids)), seq_len=seq_len, stride=stride)):
        assert len(row.ids) - 1 <= seq_len and list(row.ids) == list(range(row.ids[0], row.ids[-1] + 1))
        assert place == 0 or len(row.ids) - row.n >= seq_len - stride
        asked += row.ids[-row.n :]
    assert asked == list(range(1, n_ids))


def test_perplexity_is_that_of_the_text_as_one_document():
    model = drawn(Toy.Config(vocab_size=2048, max_seq_len=512))
    found = perplexity_of(TEXT, BUNDLED, lambda rows: score_rows(model, rows, batch_tokens=64), seq_len=512, stride=512)
    ids = BUNDLED.encode_documents([TEXT])[0][:-1]
    nats = [-log_prob for log_prob, _ in alone(model, ids, len(ids) - 1)]
    assert found.n_tokens == len(ids) - 1 and found.n_bytes == len(TEXT)
    assert found.nats_per_token == pytest.approx(sum(nats) / len(nats), abs=1e-6)
    assert found.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / len(TEXT), rel=1e-6)
    with pytest.raises(UserError, match="without tokens"):
        perplexity_of("", BUNDLED, lambda rows: [], seq_len=8, stride=8)


def test_a_text_that_is_enough_ends():
    model = drawn(Toy.Config())
    written = {"limits": [9, 9], "n_tokens": 64}
    whole = generate(model, [[1], [2, 3]], Sampler(2, temperature=0.0), **written)
    third = whole[0].ids[2]
    first = whole[0].ids.index(third) + 1
    found = generate(model, [[1], [2, 3]], Sampler(2, temperature=0.0), **written, enough=lambda ids: ids[-1] == third)
    assert found[0] == Completion(whole[0].ids[:first]) and found[1].ids == whole[1].ids[: len(found[1].ids)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_weights(drawn(Toy.Config(vocab_size=2048)), folder)
    return folder


def test_the_command_says_how_well_files_are_predicted(weights, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("é" * 50)
    words = [
        "--config",
        "toy",
        "--checkpoint",
        str(weights),
        "--perplexity",
        str(tmp_path / "a.txt"),
        str(tmp_path / "b.txt"),
    ]
    main(evaluated_recipes, [*words, "--seq-len", "32", "--stride", "16", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    model = drawn(Toy.Config(vocab_size=2048))
    expected = perplexity_of(
        TEXT, BUNDLED, lambda rows: score_rows(model, rows, batch_tokens=8192), seq_len=32, stride=16
    )
    assert found["perplexity"][str(tmp_path / "a.txt")] == expected._asdict()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[1:] == [
        f"{expected.n_tokens}",
        f"{expected.nats_per_token:.4f}",
        f"{expected.perplexity:.3f}",
        f"{expected.bits_per_byte:.4f}",
    ]
    assert found["perplexity"][str(tmp_path / "b.txt")]["n_bytes"] == 100


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "nothing to measure: give --perplexity FILE, --tasks TASK, or both"),
        (["--tasks", "arc_easy"], "the package lm_eval is not installed: pip install lm_eval, or armature-core[eval]"),
        (["--perplexity", "x", "--stride", "4096"], "stride 4096 must be at most seq_len 2048"),
        (["--perplexity", "nowhere.txt"], "nowhere.txt cannot be read: No such file or directory"),
    ],
)
def test_mistakes_are_said_before_weights_are_read(weights, monkeypatch, capsys, words, said):
    monkeypatch.setattr("core.evaluate.command.find_spec", lambda name: None)
    monkeypatch.setattr("core.generate.folder.loaded_model", None)
    with pytest.raises(SystemExit) as end:
        main(evaluated_recipes, ["--config", "toy", "--checkpoint", str(weights), *words])
    assert end.value.code == 2 and said in capsys.readouterr().err
