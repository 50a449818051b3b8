"""A run that stops and goes on is the run that never stopped. Part of `core.testing.model_suite`."""

import json
import shutil
import sys
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.checkpoint.settings import Checkpoint
from core.config.errors import UserError
from core.config.recipe import recipes
from core.config.record import from_json, to_json
from core.generate.generate import generate
from core.generate.sample import Sampler
from core.parallel.settings import Parallelism
from core.step.checks import expert_parts
from core.step.settings import Training
from core.testing.ranks import run_ranks
from core.train.trainer import Trainer
from core.train.validate import Validator
from core.weights import convert
from core.weights.files import SINGLE

TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
"""What is exported of the bundled tokenizer."""


class ResumeSuite:
    """The tests of a model whose runs are interrupted."""

    configs: ClassVar[ModuleType]
    """The module of its recipes."""
    debug: ClassVar[str]
    """Name of the recipe that trains on a laptop."""

    def test_a_run_that_goes_on_equals_one_that_never_stopped(self, tmp_path: Path) -> None:
        """Bit for bit: every file of tensors, every loss and gradient norm, through accumulation and validation."""
        whole = self.interrupted(tmp_path / "whole")
        whole.build().run()
        shutil.copytree(tmp_path / "whole", tmp_path / "again")
        shutil.rmtree(tmp_path / "again/checkpoint/step-4")
        again = self.interrupted(tmp_path / "again")
        trainer = again.build()
        assert trainer.checkpoints.start.step == 2
        trainer.run()
        for name in ("rank-00000.safetensors", "tensors.json"):
            states = [(tmp_path / run / "checkpoint/step-4" / name).read_bytes() for run in ("whole", "again")]
            assert states[0] == states[1], name
        assert measured(tmp_path / "again") == measured(tmp_path / "whole")
        assert len(measured(tmp_path / "whole")) == 4

    def test_what_a_run_leaves_goes_to_hugging_face_and_back(self, tmp_path: Path) -> None:
        """The last checkpoint's export and that of `convert` are equal, write the same text in transformers and here,
        and are what a new run begins with on two ranks; weights in few bits must be asked for."""
        run = self.interrupted(tmp_path / "run")
        run.training.steps = 2
        run.checkpoint = Checkpoint(enable=True, last_save_model_only=True, last_save_in_hf=True)
        first = run.build()
        first.run()
        left, converted = tmp_path / "run/checkpoint/step-2/hf", tmp_path / "converted"
        family = {first.built.models[0].to_hf_config()["model_type"]: type(first.built.models[0])}
        convert.main(family, ["to-hf", str(tmp_path / "run"), str(converted)])
        names = {SINGLE, "config.json", "generation_config.json", "README.md", *TOKENIZER}
        assert names == {file.name for file in left.iterdir()} == {file.name for file in converted.iterdir()}
        for name in names:
            assert (converted / name).read_bytes() == (left / name).read_bytes(), name
        assert written_by(sys.modules["transformers"], left, "The tensors of") == written_here(first, "The tensors of")
        again = self.interrupted(tmp_path / "again")
        again.checkpoint = Checkpoint(enable=True, initial_load_path=str(left), initial_load_in_hf=True)
        n_expert_ranks = 2 if expert_parts(again.model) else 1
        again.parallelism = Parallelism(tensor_parallel_degree=2, expert_parallel_degree=n_expert_ranks)
        for began in run_ranks(weights_at_start, 2, to_json(again), type(again.model).__module__):
            assert all(torch.equal(began[name], weight) for name, weight in first.built.named_parameters())
        tensors = load_file(converted / SINGLE)
        for name in [name for name in tensors if "_proj.weight" in name and tensors[name].dim() == 2]:
            tensors[name], blocks = tensors[name].to(torch.float8_e4m3fn), [-(-n // 128) for n in tensors[name].shape]
            tensors[f"{name}_scale_inv"] = torch.ones(blocks)
        save_file(tensors, converted / SINGLE, metadata={"format": "pt"})
        again.checkpoint.initial_load_path, again.parallelism = str(converted), Parallelism()
        with pytest.raises(UserError, match="in few bits: add --checkpoint.initial_load_in_hf_quantized to decode"):
            again.build()
        again.checkpoint.initial_load_in_hf_quantized = True
        decoded = dict(again.build().built.named_parameters())
        weight = next(weight for name, weight in decoded.items() if name.endswith("wo.weight"))
        assert torch.equal(weight, weight.to(torch.float8_e4m3fn).float()) and weight.any()

    def interrupted(self, folder: Path) -> Trainer.Config:
        """A small run of the model: four steps of two microbatches, saved and validated every second."""
        text = folder.parent / "topics.txt"
        text.write_text("\n".join(topics.values()), encoding="utf-8")
        config = self.run_config(self.debug)
        config.dump_folder, config.model.n_layers = str(folder), 2
        config.training = Training(steps=4, seq_len=64, local_batch_size=2, global_batch_size=4, device="cpu")
        config.validator = Validator.Config(enable=True, freq=2, steps=1)
        config.lr_scheduler.warmup_steps, config.metrics.log_freq = 2, 1
        config.dataloader.dataset, config.dataloader.cache_folder = str(text), str(folder.parent / "cache")
        config.checkpoint = Checkpoint(enable=True, interval=2)
        return config

    def run_config(self, recipe: str) -> Trainer.Config:
        """The run that a first-party recipe describes."""
        config = recipes(self.configs)[recipe]()
        assert isinstance(config, Trainer.Config)
        return config


def written_by(transformers: Any, folder: Path, prompt: str) -> str:
    """The likeliest text behind a prompt, with what the folder alone says of its model and tokenizer; by the package
    that tests of models import."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def written_here(trainer: Trainer, prompt: str) -> str:
    """The likeliest text behind a prompt, with the weights that a run has."""
    [model], tokenizer = trainer.built.models, trainer.tokenizer
    ids, ends = tokenizer.encode_prompt(prompt), [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    settings = {"limits": [12], "n_tokens": tokenizer.vocab_size, "end_ids": ends}
    [found] = generate(model.eval(), [ids], Sampler(1, temperature=0), **settings)
    return tokenizer.decode([*ids, *found.ids])


def weights_at_start(run: str, module: str) -> dict[str, Any]:
    """The weights that a rank begins a run with, put together over all ranks; the model is code of `module`."""
    named = from_json(run, trust=[module]).build().built.named_parameters()
    return {name: weight.full_tensor() if hasattr(weight, "full_tensor") else weight for name, weight in named}


def measured(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, without what depends on time and on the process."""
    timed = {"tokens_per_second", "step_time_s", "data_wait_s", "memory_gib", "mfu"}
    records = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in record.items() if name not in timed} for record in records]
