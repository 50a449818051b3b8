"""How fast text becomes tokens: our preparation beside `datasets.map` and the way of Megatron's preprocess_data.

    pip install models/qwen3 datasets tokenizers
    python benchmarks/data_cpu.py

All read the same lines of JSON with the same `tokenizer.json`, on as many processes as there are cores, and keep the
ids on the disk. Megatron's way is a pool of processes that each parse and encode one line at a time, and one that
writes; it is written here as its tool does it, without torch. Turns are taken in one process; rates are tokens per
second of CPU time, of all processes together, ratios are ours to theirs per round: median (lowest to highest). The
memory is the highest of one process, of whichever contender. The loader's rate is of rows of 4,096 tokens from a cache
that was just read, as rows of one text and of whole documents; beside it stands what steps of `qwen3_debug` consume.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from core.data.corpus import Corpus
from core.data.source import StandardLibrary
from core.data.tokenizer import Tokenizer
from core.runtime.cores import n_cores

_encoder: Any = None


def text(folder: Path, megabytes: int) -> Path:
    """Lines of JSON with the standard library, over and over."""
    sections = [section.text for section in StandardLibrary.Config().build().sections()]
    path, size, number = folder / "text.jsonl", 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            line = json.dumps({"text": f"{number} {sections[number % len(sections)]}"})
            size, number = size + len(line), number + 1
            file.write(f"{line}\n")
    return path


def train(path: Path, folder: Path) -> Path:
    """A byte-level tokenizer of 8,192 tokens, as of Llama 3 or Qwen."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8192, show_progress=False, initial_alphabet=alphabet, special_tokens=["<|end|>"]
    )
    with open(path, encoding="utf-8") as file:
        made.train_from_iterator((json.loads(line)["text"] for line, _ in zip(file, range(300), strict=False)), trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return folder / "tokenizer.json"


def ours(path: Path, tokenizer: Path, folder: Path) -> int:
    built = Tokenizer.Config(path=str(tokenizer)).build()
    settings = {"dataset": str(path), "cache_folder": str(folder), "validation_fraction": 0.0, "processes": n_cores()}
    return Corpus.Config(**settings).build(tokenizer=built).manifest.splits["train"].tokens


def by_datasets(path: Path, tokenizer: Path, folder: Path) -> int:
    import datasets

    datasets.disable_progress_bars()
    made = tokenizers.Tokenizer.from_file(str(tokenizer))

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = [[*each.ids, 0] for each in made.encode_batch(batch["text"], add_special_tokens=False)]
        return {"ids": ids, "length": [len(each) for each in ids]}

    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))
    found = rows.map(encode, batched=True, remove_columns=["text"], num_proc=n_cores())
    found.save_to_disk(folder / "ids")
    return sum(found["length"])


def _start(tokenizer: str) -> None:
    global _encoder
    _encoder = tokenizers.Tokenizer.from_file(tokenizer)


def _encode(line: str) -> list[int]:
    return [*_encoder.encode(json.loads(line)["text"], add_special_tokens=False).ids, 0]


def as_megatron(path: Path, tokenizer: Path, folder: Path) -> int:
    n_tokens, lengths = 0, []
    context = multiprocessing.get_context("spawn")
    with context.Pool(n_cores(), _start, (str(tokenizer),)) as pool, open(path, encoding="utf-8") as lines:
        with open(folder / "a.bin", "wb") as file:
            for ids in pool.imap(_encode, lines, 32):
                file.write(np.array(ids, np.uint16).tobytes())
                lengths.append(len(ids))
                n_tokens += len(ids)
    np.array(lengths, np.int32).tofile(folder / "a.idx")
    return n_tokens


CONTENDERS = {"ours": ours, "datasets.map": by_datasets, "as Megatron": as_megatron}


def cpu_s() -> float:
    """CPU time of this process, and of those that it started and that have ended."""
    return sum(os.times()[:4])


def rates(path: Path, tokenizer: Path, rounds: int) -> dict[str, list[float]]:
    """Tokens per CPU second of every round."""
    found: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        counts = set()
        for name, contender in CONTENDERS.items():
            folder = Path(tempfile.mkdtemp(dir=path.parent))
            began = cpu_s()
            n_tokens = contender(path, tokenizer, folder)
            found[name].append(n_tokens / (cpu_s() - began))
            shutil.rmtree(folder)
            counts.add(n_tokens)
        assert len(counts) == 1, f"the contenders have made different numbers of tokens: {counts}"
    return found


def rows_per_second(path: Path, tokenizer: Path, packing: Any) -> float:
    from core.data.text import IndexedText  # loads torch, which the processes of Megatron's way would load as well

    config = IndexedText.Config(dataset=str(path), cache_folder=str(path.parent / "rows"), packing=packing)
    samples = config.build(tokenizer=Tokenizer.Config(path=str(tokenizer)).build(), seq_len=4096, seed=0)
    samples.read(0, 256)
    began = time.process_time()
    for first in range(0, 512, 8):
        samples.read(first, 8)
    return 512 / (time.process_time() - began)


def rows_consumed() -> float:
    """Rows of 4,096 tokens that training steps of qwen3_debug take in a second of CPU time."""
    from qwen3.configs import qwen3_debug

    config = qwen3_debug()
    with tempfile.TemporaryDirectory() as folder:
        config.dump_folder, config.training.steps, config.validator.enable = folder, 4, False
        config.lr_scheduler.warmup_steps = 0
        trainer = config.build()
        trainer.step(1)
        began = time.process_time()
        for step in (2, 3, 4):
            trainer.step(step)
        took_s = time.process_time() - began
        trainer.exit.close()
    return 3 * trainer.rows_per_step * config.training.seq_len / 4096 / took_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64, help="text to prepare")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    with tempfile.TemporaryDirectory() as name:
        path = text(Path(name), args.megabytes)
        tokenizer = train(path, Path(name))
        found = rates(path, tokenizer, args.rounds)
        print(f"{args.megabytes} MB of JSON lines, {n_cores()} cores")
        for contender, each in found.items():
            ratio = [own / other for own, other in zip(found["ours"], each, strict=True)]
            spread = f"{statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})"
            print(f"{contender:14} {statistics.median(each):12,.0f} tokens/CPU s   ours is {spread} times that")
        used = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        print(f"at most {used / 1024:,.0f} MiB in one process, datasets' among them")
        consumed = rows_consumed()
        print(f"{'a step takes':14} {consumed:12,.1f} rows of 4,096 tokens per CPU second (qwen3_debug)")
        for packing in ("concatenate", "best_fit"):
            rows = rows_per_second(path, tokenizer, packing)
            print(f"{packing:14} {rows:12,.0f} rows of 4,096 tokens per CPU second, {rows / consumed:,.0f} times that")


if __name__ == "__main__":
    main()
