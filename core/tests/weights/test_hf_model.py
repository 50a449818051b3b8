"""A model that Hugging Face does not have: it needs nothing for it, and what would need its form says so."""

from pathlib import Path

import pytest
import torch

from core.checkpoint.settings import Checkpoint
from core.config.errors import UserError
from core.runtime.meta import meta_model
from core.step.checks import check_model
from core.testing.toy import Toy, ToyMoE, on_cpu
from core.train.outcome import expressible
from core.train.trainer import Trainer
from core.weights.convert import main
from core.weights.folder import load_folder, load_weights, save_weights
from core.weights.hf import load_hf, save_hf
from core.weights.hf_model import HFModel

WORDS = "ToyMoE has no form at Hugging Face, so it is not converted and not exported"


def test_a_folder_of_ours_needs_no_form(tmp_path: Path) -> None:
    model, read = on_cpu(ToyMoE.Config(), seed=1), on_cpu(ToyMoE.Config(), seed=2)
    save_weights(model, tmp_path)
    load_weights(read, tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in read.state_dict().items())
    load_folder(on_cpu(ToyMoE.Config()), tmp_path)


def test_what_needs_one_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = on_cpu(ToyMoE.Config())
    with pytest.raises(UserError, match=WORDS):
        save_hf(model, tmp_path / "there")
    with pytest.raises(UserError, match=WORDS):
        load_hf(model, tmp_path)
    assert not (tmp_path / "there").exists() and not expressible(model) and expressible(on_cpu(Toy.Config()))
    run = Trainer.Config(model=ToyMoE.Config(), checkpoint=Checkpoint(enable=True, last_save_in_hf=True))
    with pytest.raises(UserError, match=WORDS):
        check_model(meta_model(run.model), run, torch.device("cpu"))
    run.checkpoint.last_save_in_hf = False
    check_model(meta_model(run.model), run, torch.device("cpu"))
    with pytest.raises(SystemExit) as ended:
        main({"toy_moe": ToyMoE}, ["to-hf", str(tmp_path), str(tmp_path / "there")])
    assert ended.value.code == 2 and WORDS in capsys.readouterr().err


FORM = Toy.hf_form()


class Named(HFModel):
    HF = f"{__name__}:FORM"


def test_a_form_is_found_by_its_name() -> None:
    assert Named.hf_form() is FORM and Named.from_hf_config is not Toy.from_hf_config
