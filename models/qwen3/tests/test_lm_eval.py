"""An export in lm_eval, which `nox -s peers` installs: it writes what `generate` writes, and weighs texts as the model
does."""

import json
from pathlib import Path

import pytest
import torch

from core.data.tokenizer import Tokenizer, bundled_model
from core.generate.command import main as generate
from core.testing.peer_models import draw
from core.testing.toy import on_cpu
from core.weights.convert import main as convert
from core.weights.folder import save_weights
from qwen3 import configs
from qwen3.model import Qwen3, size

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # warnings of other programs are theirs
PROMPTS = ["def main", "The whale", "class A:\n", "ü 日本"]


@torch.no_grad()
def test_an_export_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = on_cpu(size("debug")).eval()
    draw(model, 0.1)
    save_weights(model, tmp_path / "ours")
    (tmp_path / "ours/tokenizer.model").write_bytes(bundled_model())
    convert({"qwen3": Qwen3}, ["to-hf", str(tmp_path / "ours"), str(tmp_path / "hf")])
    capsys.readouterr()
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    words += ["--checkpoint", str(tmp_path / "ours"), "--temperature", "0", "--max-new-tokens", "16", "--json"]
    generate(configs, words)
    written = {line["number"]: line["text"] for line in map(json.loads, capsys.readouterr().out.splitlines())}
    expected = [written[number] for number in range(1, len(PROMPTS) + 1)]
    assert len(set(expected)) == len(PROMPTS)
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=1)
    greedy = {"until": [], "max_gen_toks": 16, "do_sample": False}
    asked = [Instance("generate_until", {}, (prompt, greedy), number) for number, prompt in enumerate(PROMPTS)]
    assert theirs.generate_until(asked) == expected

    tokenizer = Tokenizer.Config().build()
    [(found, _)] = theirs.loglikelihood([Instance("loglikelihood", {}, ("The whale", " is large"), 0)])
    before, text = ([1, *tokenizer.encode(text)] for text in ("The whale", "The whale is large"))
    logits_LV = model(torch.tensor([text]))[0]
    wanted = logits_LV.log_softmax(-1)[torch.arange(len(text) - 1), text[1:]][len(before) - 1 :].sum()
    assert found == pytest.approx(wanted.item(), abs=1e-3)
