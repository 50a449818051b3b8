"""A run on conversations: its loss is the mean over what the assistant wrote, and a stop changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import toy_run

from core.checkpoint.settings import Checkpoint
from core.data.chat import Chat
from core.data.packing import IGNORE, PADDING
from core.data.tokenizer import Tokenizer
from core.nn.kernel import Positions
from core.train.trainer import Trainer
from core.train.validate import Validator

tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of many lengths, and a tokenizer with a template that does not say what the assistant wrote."""
    folder = tmp_path_factory.mktemp("chat")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([""], tokenizers.trainers.BpeTrainer(show_progress=False, initial_alphabet=alphabet))
    made.add_special_tokens(["<|user|>", "<|assistant|>", "<|end|>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": TEMPLATE}))
    rows = [
        {"messages": [{"role": "user", "content": "q" * (n % 9)}, {"role": "assistant", "content": "ab" * (1 + n % 5)}]}
        for n in range(120)
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def chat_run(data: Path, folder: Path, steps: int) -> Trainer.Config:
    run = toy_run(folder, steps=steps)
    run.tokenizer = Tokenizer.Config(path=str(data))
    cache = str(data / "cache")
    run.dataloader = Chat.Config(dataset=str(data / "talks.jsonl"), cache_folder=cache, validation_fraction=0.1)
    run.training.seq_len = 40
    run.validator = Validator.Config(enable=True, freq=2)
    run.checkpoint = Checkpoint(enable=True, interval=2)
    run.lr_scheduler.warmup_steps = 1
    run.lr_scheduler.decay_ratio = 0.0
    return run


def losses(folder: Path) -> list[Any]:
    lines = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    names = ("step", "loss", "grad_norm", "validation_loss", "tokens")
    return [tuple(line[name] for name in names) for line in lines]


def test_what_the_assistant_wrote_counts_and_nothing_else(data: Path, tmp_path: Path) -> None:
    run = chat_run(data, tmp_path, 1)
    run.optimizer.lr = 0.0
    trainer = run.build()
    batch = trainer.batches(1)[0]
    trainer.run()
    assert json.loads((tmp_path / "run/config.json").read_text())["training"]["mask"] == "document"
    (model,) = trainer.built.models
    nats: list[torch.Tensor] = []
    with torch.no_grad():
        for tokens, labels, numbers in zip(batch.tokens_BL, batch.labels_BL, batch.documents_BL, strict=True):
            for number in range(int(numbers.max()) + 1):  # each conversation by itself
                own = numbers == number
                counted = labels[own] != IGNORE
                if not counted.any():
                    continue
                alone = tokens[own][None]
                logits = model(alone, Positions.rows(alone))[0]
                nats += [torch.nn.functional.cross_entropy(logits[counted], labels[own][counted], reduction="sum")]
    n = int((batch.labels_BL != IGNORE).sum())
    assert losses(tmp_path)[0][1] == pytest.approx(float(sum(nats)) / n, abs=1e-5)
    n_tokens = int((batch.documents_BL != PADDING).sum())
    record = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert record["tokens"] == n_tokens < batch.tokens_BL.numel()
    assert record["tokens_per_second"] * record["step_time_s"] == pytest.approx(n_tokens)


def test_a_stop_changes_nothing(data: Path, tmp_path: Path) -> None:
    chat_run(data, tmp_path / "whole", 4).build().run()
    chat_run(data, tmp_path / "torn", 2).build().run()
    chat_run(data, tmp_path / "torn", 4).build().run()
    assert losses(tmp_path / "torn") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 4
    rows = chat_run(data, tmp_path / "rows", 4).build()
    rows.exit.close()
    n = 3 * rows.loader.rows_per_epoch
    read = (rows.loader.read(0, n).documents_BL != PADDING).sum(1).cumsum(0).tolist()
    for n_rows in (1, 4, 16, 17, n // 3, n - 1, 5, n):  # of several epochs, and back
        assert rows.loader.tokens_before(n_rows) == read[n_rows - 1]
    assert [line[-1] for line in losses(tmp_path / "whole")] == [read[4 * step - 1] for step in (1, 2, 3, 4)]
