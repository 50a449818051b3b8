"""A run of adapters of a model, and the logits that peft and our folders must have of it."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core.data.tokenizer import Tokenizer
from core.evaluate import command as evaluate
from core.generate import command as generate
from core.quantization.lora import LoRAConverter
from core.testing.toy import on_cpu
from core.train.trainer import Trainer
from core.weights.folder import load_folder
from core.weights.hf import save_hf

TOKENS = torch.arange(3, 27).view(2, 12)
PROMPT = "a page of text with many words in it"


def adapter_run(config: Trainer.Config, folder: Path, adapters: LoRAConverter.Config) -> Trainer.Config:
    """A debug recipe as a run of two steps and two blocks that adapts a Hugging Face folder of several files, which is
    written."""
    config.model.n_layers, config.training = 2, replace(config.training, steps=2, seq_len=32, local_batch_size=2)
    config.validator.enable, config.lr_scheduler.warmup_steps = False, 0
    save_hf(on_cpu(config.model, seed=5), folder / "base", shard_gib=2**-10)
    assert len(list((folder / "base").glob("*.safetensors"))) > 1
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


def model_in_peft(base: Path, folder: Path) -> Any:
    """The model that peft makes of a folder of its own."""
    peft = pytest.importorskip("peft", reason="a reference that a test environment need not have")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, folder).eval()


def logits_in_peft(base: Path, folder: Path) -> Tensor:
    """What peft computes with a folder of its own."""
    with torch.no_grad():
        return model_in_peft(base, folder)(TOKENS).logits


def check_commands_with_peft(configs: ModuleType, base: Path, folder: Path, capsys: Any) -> None:
    """What `generate` and `evaluate` say of a folder of peft's, against what peft writes and predicts."""
    model, tokenizer, device = model_in_peft(base, folder), Tokenizer.Config().build(), ["--device", "cpu"]
    capsys.readouterr()
    asked = ["--checkpoint", str(folder), "--prompt", PROMPT, "--temperature", "0", "--max_new_tokens", "16", "--json"]
    generate.main(configs, [*asked, *device])
    written = json.loads(capsys.readouterr().out)["text"]
    ids = tokenizer.encode_prompt(PROMPT)
    theirs = model.generate(
        input_ids=torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=tokenizer.eos_id, pad_token_id=0
    )[0].tolist()
    assert theirs[: len(ids)] == ids and len(theirs) > len(ids) + 4
    assert PROMPT + written == tokenizer.decode(theirs)
    file, out = folder.parent / "held out.txt", folder.parent / "found.json"
    file.write_text(PROMPT)
    evaluate.main(configs, ["--checkpoint", str(folder), "--perplexity", str(file), "--out", str(out), *device])
    (found,) = json.loads(out.read_text())["perplexity"].values()
    row = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(PROMPT)]])
    with torch.no_grad():
        expected = F.cross_entropy(model(row).logits[0, :-1], row[0, 1:]).item()
    assert found["nats_per_token"] == pytest.approx(expected, abs=1e-5)
    capsys.readouterr()
