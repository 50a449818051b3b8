"""Adapters of a Llama 3, whose queries and keys are rotated in other pairs at Hugging Face, to a folder of peft's and
back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.quantization.lora import LoRAConverter
from core.testing.toy import on_cpu
from core.train.trainer import Trainer
from core.weights import convert
from core.weights.folder import load_folder
from core.weights.hf import save_hf
from llama3 import configs
from llama3.model import Llama3, size

TOKENS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def tuned(request: Any, tmp_path_factory: Any) -> tuple[Path, torch.Tensor]:
    """A folder with the base, a run that adapted it, and what its adapters are to peft; the logits of its model."""
    folder = tmp_path_factory.mktemp("tuned")
    config: Trainer.Config = configs.llama3_debug()
    config.model.n_layers, config.training = 2, replace(config.training, steps=2, seq_len=32, local_batch_size=2)
    config.validator.enable, config.lr_scheduler.warmup_steps = False, 0
    save_hf(on_cpu(config.model, seed=5), folder / "base")
    (folder / "text.txt").write_text("a page of text with many words in it\n" * 200)
    config.dataloader.dataset, config.dataloader.cache_folder = str(folder / "text.txt"), str(folder / "cache")
    config.dataloader.validation_fraction, config.dump_folder = 0.0, str(folder / "run")
    config.converters = [LoRAConverter.Config(rank=4, alpha=8.0, dora=request.param)]
    config.checkpoint.initial_load_path = str(folder / "base")
    trainer: Trainer = config.build()
    trainer.run()
    with torch.no_grad():
        expected = trainer.built.models[0].eval()(TOKENS)
        base = on_cpu(config.model, seed=5).eval()(TOKENS)
    assert (expected - base).abs().max() > 1e-3
    convert.main({"llama": Llama3}, ["to-hf", str(folder / "run"), str(folder / "peft"), "--peft"])
    return folder, expected


def test_a_folder_of_peft_is_read_back(tuned: tuple[Path, torch.Tensor]) -> None:
    folder, expected = tuned
    convert.main({"llama": Llama3}, ["from-hf", str(folder / "peft"), str(folder / "merged")])
    model = on_cpu(replace(size("debug"), n_layers=2))
    load_folder(model, folder / "merged")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(TOKENS), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # warnings of other programs are theirs
def test_peft_computes_the_same(tuned: tuple[Path, torch.Tensor]) -> None:
    peft = pytest.importorskip("peft", reason="a reference that a test environment need not have")
    transformers = pytest.importorskip("transformers")
    folder, expected = tuned
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=1e-5)
