"""Three newcomers follow the documents in environments of their own, from the installation on: `nox -s stories`.

A student with a laptop, an engineer with text and several ranks, and somebody who publishes a model. Commands are the
documents' and those that a run prints, word for word, in a real shell; the report says how long each took. What is
cheap of it is tested with every change: the documents in test_data_document.py, test_own_package.py and
test_continue_pretraining.py, the commands that a run prints in the model suite, installing in core's test_packaging.py.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.testing.document import commands, shown_files

ROOT = Path(__file__).parents[3]
TEXT = "The whale swam along the coast, and the ship went after the whale. Nobody saw where the sea began.\n"
PUBLISHED = """
import tokenizers, torch, transformers
torch.manual_seed(0)
sizes = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
config = transformers.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=16, max_position_embeddings=512)
transformers.Qwen3ForCausalLM(config).save_pretrained("Qwen3-0.6B")
pieces = tokenizers.Tokenizer(tokenizers.models.BPE())
pieces.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
pieces.decoder = tokenizers.decoders.ByteLevel()
alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
pieces.train_from_iterator([], tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
transformers.PreTrainedTokenizerFast(tokenizer_object=pieces).save_pretrained("Qwen3-0.6B")
"""

pytestmark = pytest.mark.stories


class Newcomer:
    """Somebody with a home, an empty environment in `.venv`, and a checkout called `armature` beside it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        dust = shutil.ignore_patterns(".git", ".nox", ".venv", "__pycache__", "outputs", "dist")
        shutil.copytree(ROOT, home / "armature", ignore=dust)
        own = ("PYTHONPATH", "PYTEST_CURRENT_TEST", "VIRTUAL_ENV")
        kept = {name: value for name, value in os.environ.items() if name not in own}
        self.environ = {**kept, "HOME": str(home), "PATH": f"{home}/.venv/bin:{os.environ['PATH']}"}
        self.environ.pop("XDG_CACHE_HOME", None)

    def start(self, line: str, folder: str = ".") -> subprocess.Popen[str]:
        """A line in a shell, going on."""
        command = ["bash", "-euo", "pipefail", "-c", line]
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=self.home / folder, env=self.environ, text=True, **both)

    def do(self, line: str, folder: str = ".") -> str:
        """What a line in a shell prints; how long it took goes into the report."""
        began = time.monotonic()
        process = self.start(line, folder)
        said, _ = process.communicate()
        print(f"{time.monotonic() - began:7.1f} s  {line.splitlines()[0][:100]}")
        assert process.returncode == 0, f"{line}\n{said}"
        return said

    def write(self, name: str, text: str) -> None:
        (self.home / name).parent.mkdir(parents=True, exist_ok=True)
        (self.home / name).write_text(text)

    def records(self, run: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.home / run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def newcomer(tmp_path: Path) -> Iterator[Newcomer]:
    began = time.monotonic()
    yield Newcomer(tmp_path)
    print(f"{time.monotonic() - began:7.1f} s  in all")


def printed_commands(said: str) -> dict[str, str]:
    """The commands at the end of a run, by their purposes."""
    found: dict[str, list[str]] = {}
    for line in said.splitlines():
        if line.startswith("# "):
            found[line[2:]] = []
        elif found:
            found[list(found)[-1]].append(line)
    return {purpose: "\n".join(lines) for purpose, lines in found.items()}


def test_a_student_with_a_laptop(newcomer: Newcomer) -> None:
    (first,) = [line for line in (ROOT / "README.md").read_text().splitlines() if "pip install models/qwen3 &&" in line]
    said = newcomer.do(first, "armature")
    newcomer.environ["PATH"] = f"{newcomer.home}/armature/.venv/bin:{os.environ['PATH']}"
    assert float(re.findall(r"loss (\d\.\d+)", said)[-1]) < 5 and "finished 400 steps" in said
    printed = printed_commands(said)
    purposes = ["look at it, in a page for a browser", "write text", "go on, to step 800"]
    assert list(printed) == [*purposes, "export to a Hugging Face folder"]
    for line in printed.values():
        newcomer.do(line, "armature")
    (run,) = (newcomer.home / "armature/outputs").iterdir()
    losses = [record["loss"] for record in newcomer.records(str(run))]
    assert losses[-1] < losses[len(losses) // 2] < losses[0]
    assert "--optimizer.lr FLOAT = 0.004" in newcomer.do("python -m qwen3.train --help lr")
    assert "torch" in newcomer.do("python -m qwen3.train --version")
    completed = newcomer.do(
        "python -m qwen3.train --print-completion bash > qwen3.bash; . ./qwen3.bash; "
        "COMP_WORDS=(python -m qwen3.train --config qwen3_d) COMP_CWORD=4; _armature python; echo ${COMPREPLY[*]}"
    )
    debug = ["qwen3_debug", *(f"qwen3_debug_{what}" for what in ("float8", "muon", "nvfp4"))]
    assert completed.split() == debug
    newcomer.write("books/moby-dick.txt", TEXT * 6000)
    train = "python -m qwen3.train --config qwen3_debug --training.steps 20"
    newcomer.do(f"{train} --dataloader.dataset books/moby-dick.txt")


def test_an_engineer_with_text_and_two_ranks(newcomer: Newcomer) -> None:
    git = "git -c user.name=a -c user.email=a@example.com"
    newcomer.do(f"{git} init -q && {git} add . && {git} commit -qm all", "armature")
    newcomer.do(f"{sys.executable} -m venv .venv")
    address = f"git+file://localhost{newcomer.home}/armature"
    newcomer.do(f"pip install 'armature-qwen3[tensorboard] @ {address}#subdirectory=models/qwen3'")
    assert str(newcomer.home / "armature") not in newcomer.do("pip freeze").replace(address, "")
    for number in range(40):
        lines = [json.dumps({"text": f"{number}.{verse}. {TEXT * 5}"}) for verse in range(50)]
        newcomer.write(f"books/{number}.jsonl", "\n".join(lines))
    newcomer.do("python -m core.data.train_tokenizer --dataset books --vocab-size 320 --output my.model")
    newcomer.do("python -m core.data.prepare --dataset books --tokenizer my.model")
    plan = "python -m qwen3.train --config qwen3_32b --parallelism.tensor_parallel_degree 8 --dry-run --world-size 128"
    assert "peak of all" in newcomer.do(plan)
    train = (
        "torchrun --nproc-per-node 2 -m qwen3.train --config qwen3_debug --dataloader.dataset books "
        "--tokenizer.path my.model --model.vocab_size 320 "
        "--training.steps 60 --metrics.log_freq 1 --metrics.enable_tensorboard "
        "--checkpoint.enable --checkpoint.interval 20"
    )
    newcomer.do(f"{train} --dump_folder whole")
    with newcomer.start(f"exec {train} --dump_folder stopped") as process:
        for line in process.stdout or []:
            if line.startswith("step 30/60"):
                process.send_signal(signal.SIGTERM)
    assert 30 <= newcomer.records("stopped")[-1]["step"] < 60
    newcomer.do(f"{train} --dump_folder stopped")
    whole, stopped = ([record["loss"] for record in newcomer.records(run)] for run in ("whole", "stopped"))
    assert whole == stopped and len(whole) == 60
    assert list((newcomer.home / "stopped/tb").glob("events*"))
    newcomer.do("python -m qwen3.generate --checkpoint stopped --prompt 'The whale' --max-new-tokens 8")


def test_somebody_who_publishes_a_model(newcomer: Newcomer) -> None:
    newcomer.do(f"{sys.executable} -m venv .venv")
    for name, text in shown_files(ROOT / "docs/own-package.md").items():
        newcomer.write(name, text)
    for words in commands(ROOT / "docs/own-package.md"):
        newcomer.do(shlex.join(words))
    assert newcomer.records("runs/signum")[-1]["perplexity"] > 1
    newcomer.do("pip install 'armature/models/qwen3[hf]' transformers")
    newcomer.write("published.py", PUBLISHED)
    newcomer.do("python published.py")
    for number in range(40):
        newcomer.write(f"books/{number:02}.txt", f"Chapter {number}.\n{TEXT * 80}")
    for words in commands(ROOT / "docs/continue-pretraining.md"):
        newcomer.do(shlex.join(words))
    losses = [newcomer.records(run)[-1]["validation_loss"] for run in ("runs/before", "runs/continued")]
    assert losses[1] < losses[0]
    ((name, program),) = shown_files(ROOT / "docs/continue-pretraining.md").items()
    newcomer.write(name, program)
    assert "The whale" in newcomer.do(f"python {name}")
