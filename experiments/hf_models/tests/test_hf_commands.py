"""Models of transformers write and are measured: out of a run, and out of a folder of transformers.

Letters: B rows, L length, V vocabulary.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hf_families import FAMILIES, SIZES, WRITING
from test_hf_runs import a_run
from torch import Tensor
from torch.nn import functional as F

from core.config.errors import UserError
from core.data.tokenizer import Tokenizer
from core.evaluate.command import main as evaluate
from core.evaluate.scores import ScoredRow, score_rows
from core.generate.command import main as generate
from core.nn.init import materialise
from core.parallel.layout import SingleRank
from core.runtime.meta import meta_model
from hf_models import cached
from hf_models.cached import CachedHFModel
from hf_models.commands import HFEvaluation, HFGeneration
from hf_models.configs import TINY
from hf_models.folder import start_values
from hf_models.model import HFModel
from hf_models.trainer import fill


def both(stated: Any, path: Path) -> tuple[HFModel, Any]:
    """A model whose weights all matter, as a command reads it out of its folder, and transformers' own."""
    torch.manual_seed(0)
    theirs = tf.AutoModelForCausalLM.from_config(stated).eval()
    for weight in theirs.parameters():
        with torch.no_grad():
            weight.mul_(3.0) if weight.dim() > 1 else weight.normal_(0.5, 0.1)
    theirs.save_pretrained(path)
    ours = meta_model(HFModel.Config(path=str(path)))
    materialise(ours, torch.device("cpu"), torch.float32)
    fill(ours, start_values(str(path), "auto", "weights", 0), SingleRank(torch.device("cpu")))
    return ours.eval(), theirs


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(WRITING))
def test_pieces_of_a_batch_are_read_as_each_row_alone(family: str, tmp_path: Path) -> None:
    ours, theirs = both(FAMILIES[family](), tmp_path)
    n_pads, length, end = [0, 9, 4], 24, 0
    tokens_BL = torch.randint(97, (3, length), generator=torch.Generator().manual_seed(1))
    alone = [theirs(row_L[None, n:]).logits[0] for row_L, n in zip(tokens_BL, n_pads, strict=True)]
    with CachedHFModel(ours, n_pads=n_pads, capacity=length) as reader:
        for piece_BL in tokens_BL.split([12, 1, 1, 5, 1, 4], dim=1):
            end += piece_BL.shape[1]
            expected_BV = torch.stack([row_LV[end - n - 1] for row_LV, n in zip(alone, n_pads, strict=True)])
            assert expected_BV.std() > 0.1
            torch.testing.assert_close(reader(piece_BL), expected_BV, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["RobertaConfig", "MambaConfig"])
def test_rows_without_pads_are_read_as_a_model_by_itself_counts_and_hides(name: str, tmp_path: Path) -> None:
    """RoBERTa counts positions from the one behind its padding's, and Mamba has a mask for new tokens alone."""
    ours, theirs = both(getattr(tf, name)(**SIZES, is_decoder=True, state_size=8), tmp_path)
    tokens_BL = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    expected_BLV = theirs(tokens_BL).logits
    with CachedHFModel(ours, n_pads=[0, 0], capacity=12) as reader:
        found = [reader(piece_BL) for piece_BL in tokens_BL.split([9, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.stack(found, 1), expected_BLV[:, 8:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(tokens_BL), expected_BLV, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_is_read_otherwise_in_pieces_is_refused(tmp_path: Path) -> None:
    """RoBERTa with rows that begin with no text: its positions would be others."""
    ours, _ = both(tf.RobertaConfig(**SIZES, is_decoder=True), tmp_path)
    with (
        pytest.raises(UserError, match=r"has other logits, by \d+% of their deviation, for a text in a batch"),
        CachedHFModel(ours, n_pads=[0, 3], capacity=12),
    ):
        pass
    ours, _ = both(FAMILIES["recurrent_gemma"](), tmp_path / "other")
    with (
        pytest.raises(UserError, match="keeps nothing of a text that it hands on"),
        CachedHFModel(ours, n_pads=[0], capacity=12),
    ):
        pass


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "granite"])  # whose head is read in chunks, and whose logits are whole
def test_rows_are_scored_as_transformers_predicts_them(family: str, tmp_path: Path) -> None:
    ours, theirs = both(FAMILIES[family](), tmp_path)
    rows = [torch.randint(97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (20, 9)]
    found = score_rows(ours, [ScoredRow(ids, len(ids) - 1) for ids in rows], batch_tokens=64)  # pyrefly: ignore
    for ids, score in zip(rows, found, strict=True):
        assert score.log_probs == pytest.approx(log_probs(theirs, ids).tolist(), rel=1e-5)


@torch.no_grad()
def log_probs(theirs: Any, ids: list[int]) -> Tensor:
    """What transformers' model says of all ids but the first, (L - 1,), in nats."""
    logits_LV = theirs(torch.tensor([ids[:-1]])).logits[0].float()
    return -F.cross_entropy(logits_LV, torch.tensor(ids[1:]), reduction="none")


def test_a_run_and_its_export_write_and_are_measured_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(TINY, tmp_path).build().run()
    exported, text = tmp_path / "exported", tmp_path / "text.txt"
    words = ["-m", "hf_models.convert", "to-hf", str(tmp_path / "run"), str(exported)]
    subprocess.run([sys.executable, *words], check=True)  # by itself, with nothing imported that the run names
    text.write_text("def main() -> None:\n    return None\n" * 4)
    theirs, tokenizer = tf.AutoModelForCausalLM.from_pretrained(exported), Tokenizer.Config().build()
    ids = tokenizer.encode_prompt("def main")
    for _ in range(6):
        ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
    for folder in (tmp_path / "run", exported):
        at = ["--checkpoint", str(folder), "--device", "cpu"]
        words = ["--prompt", "def main", "--prompt", "import", "--max-new-tokens", "6", "--temperature", "0", "--json"]
        capsys.readouterr()
        generate("hf_models.configs", [*at, *words], HFGeneration)
        first = json.loads(capsys.readouterr().out.split("\n")[0])
        assert first["prompt"] == "def main" and "def main" + first["text"] == tokenizer.decode(ids)
        out = tmp_path / "found.json"
        evaluate("hf_models.configs", [*at, "--perplexity", str(text), "--out", str(out)], HFEvaluation)
        (found,) = json.loads(out.read_text())["perplexity"].values()
        expected = -log_probs(theirs, tokenizer.encode_prompt(text.read_text())).mean().item()
        assert found["nats_per_token"] == pytest.approx(expected, rel=1e-5)


def test_a_model_that_keeps_nothing_of_a_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = both(FAMILIES["llama"](), tmp_path)
    monkeypatch.setattr(cached, "accepts", lambda path, name: name == "input_ids")
    with pytest.raises(UserError, match="LlamaForCausalLM of transformers keeps nothing of a text"):
        CachedHFModel(ours, n_pads=[0], capacity=4)
    monkeypatch.setattr(cached, "accepts", lambda path, name: name == "cache")
    with pytest.raises(UserError, match="no attention_mask: give prompts of one length"):
        CachedHFModel(ours, n_pads=[0, 2], capacity=4)


def test_a_folder_of_no_model_of_transformers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lama"}))
    with pytest.raises(SystemExit) as stopped:
        generate("hf_models.configs", ["--checkpoint", str(tmp_path), "--prompt", "a"], HFGeneration)
    assert stopped.value.code == 2
    assert "no causal language model of type lama; did you mean" in capsys.readouterr().err
