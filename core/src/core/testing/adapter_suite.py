"""A run of adapters of a model, and the logits that peft and our folders must have of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.quantization.lora import LoRAConverter
from core.testing.toy import on_cpu
from core.train.trainer import Trainer
from core.weights.folder import load_folder
from core.weights.hf import save_hf

TOKENS = torch.arange(3, 27).view(2, 12)


def adapter_run(config: Trainer.Config, folder: Path, adapters: LoRAConverter.Config) -> Trainer.Config:
    """A debug recipe as a run of two steps and two blocks that adapts a Hugging Face folder, which is written."""
    config.model.n_layers, config.training = 2, replace(config.training, steps=2, seq_len=32, local_batch_size=2)
    config.validator.enable, config.lr_scheduler.warmup_steps = False, 0
    save_hf(on_cpu(config.model, seed=5), folder / "base")
    (folder / "text.txt").write_text("a page of text with many words in it\n" * 200)
    config.dataloader.dataset, config.dataloader.cache_folder = str(folder / "text.txt"), str(folder / "cache")
    config.dataloader.validation_fraction, config.dump_folder = 0.0, str(folder / "run")
    config.converters = [adapters]
    config.checkpoint.initial_load_path = str(folder / "base")
    return config


def logits_after(config: Trainer.Config) -> Tensor:
    """Train, and return the logits (2, 12, V) of the model, which differ from those before."""
    trainer: Trainer = config.build()
    trainer.run()
    with torch.no_grad():
        found = trainer.built.models[0].eval()(TOKENS)
        before = on_cpu(config.model, seed=5).eval()(TOKENS)
    assert (found - before).abs().max() > 1e-3
    return found


def logits_of(config: Trainer.Config, folder: Path) -> Tensor:
    """The logits of a model with the weights of a folder."""
    model = on_cpu(config.model)
    load_folder(model, folder)
    with torch.no_grad():
        return model.eval()(TOKENS)


def logits_in_peft(base: Path, folder: Path) -> Tensor:
    """What peft computes with a folder of its own."""
    peft = pytest.importorskip("peft", reason="a reference that a test environment need not have")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, folder).eval()(TOKENS).logits
