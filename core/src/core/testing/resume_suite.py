"""A run that stops and goes on is the run that never stopped. Part of `core.testing.model_suite`."""

import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any, ClassVar

from core.checkpoint.settings import Checkpoint
from core.config.cli import recipes
from core.train.settings import Training
from core.train.trainer import Trainer
from core.train.validate import Validator


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
        assert trainer.keeper.start.step == 2
        trainer.run()
        for name in ("rank-00000.safetensors", "tensors.json"):
            states = [(tmp_path / run / "checkpoint/step-4" / name).read_bytes() for run in ("whole", "again")]
            assert states[0] == states[1], name
        assert measured(tmp_path / "again") == measured(tmp_path / "whole")
        assert len(measured(tmp_path / "whole")) == 4

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
        """The run that a recipe of ours describes."""
        config = recipes(self.configs)[recipe]()
        assert isinstance(config, Trainer.Config)
        return config


def measured(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, without what depends on time and on the process."""
    timed = {"tokens_per_second", "step_time_s", "memory_gib", "mfu"}
    records = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in record.items() if name not in timed} for record in records]
