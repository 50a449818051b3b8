"""A run whose products are in 8 bits leaves what any run leaves: a folder that transformers loads."""

from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM

from core.checkpoint.settings import Checkpoint
from core.testing.model_suite import assert_same_logits
from core.testing.toy import on_cpu
from core.weights.folder import load_folder
from qwen3.configs import qwen3_debug_float8


def test_the_export_of_a_converted_run_is_a_plain_model(tmp_path: Path) -> None:
    (tmp_path / "topics.txt").write_text("\n".join(topics.values()), encoding="utf-8")
    run = qwen3_debug_float8()
    run.dump_folder, run.model.n_layers, run.training.device = str(tmp_path / "run"), 1, "cpu"
    run.training.steps, run.training.seq_len, run.training.local_batch_size = 1, 32, 2
    run.lr_scheduler.warmup_steps, run.validator.enable = 0, False
    run.dataloader.dataset, run.dataloader.cache_folder = str(tmp_path / "topics.txt"), str(tmp_path / "cache")
    run.checkpoint = Checkpoint(enable=True, last_save_model_only=True, last_save_in_hf=True)
    trainer = run.build()
    trainer.run()
    plain, left = on_cpu(run.model), tmp_path / "run/checkpoint/step-1/hf"
    load_folder(plain, left)
    for name, weight in trainer.built.named_parameters():
        assert torch.equal(plain.get_parameter(name), weight), name
    assert_same_logits(plain, AutoModelForCausalLM.from_pretrained(left), run.model)
