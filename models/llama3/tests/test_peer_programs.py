"""Folders that other programs wrote themselves, and their logits. `nox -s peers` installs them; nothing needs a GPU."""

import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch.distributed import checkpoint as dcp

from core.testing.peer_models import assert_same_logits, converted, draw, written_by_megatron
from llama3.model import Llama3

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # warnings of other programs are theirs
MODELS = {"llama": Llama3}
SIZES = dict(
    model_type="llama", vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5,
)  # fmt: skip


def test_litgpt(tmp_path: Path) -> None:
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import save_config

    config = Config(
        name="tiny", n_layer=3, n_embd=32, n_head=4, n_query_groups=2, head_size=8, vocab_size=128, block_size=64,
        rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=1e-5,
        mlp_class_name="LLaMAMLP", intermediate_size=48, rope_base=10000, padding_multiple=64,
    )  # fmt: skip
    model = GPT(config)
    draw(model, 0.1)
    (tmp_path / "theirs").mkdir()
    torch.save({"model": model.state_dict()}, tmp_path / "theirs/lit_model.pth")
    save_config(config, tmp_path / "theirs")
    assert_same_logits(converted("litgpt", tmp_path, Llama3.from_hf_config(SIZES), MODELS), model, 2e-5)


def test_torchtitan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels want Triton when they are imported, and are not used here."""
    monkeypatch.setitem(sys.modules, "torchtitan.distributed.minimal_async_ep.kernels", MagicMock())
    from torchtitan.components.checkpoint import ModelWrapper
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import llama3_configs

    config = llama3_configs["debugmodel"]("flex")
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    model = config.build()
    draw(model, 0.1)
    state = ModelWrapper(model).state_dict() | {
        "train_state": {"step": torch.tensor(7)},
        "lr_scheduler": {"last_epoch": 7},
    }
    optimizer = {"state": {"norm.weight": {"exp_avg": torch.ones(256)}}}
    dcp.save(state | {"optimizer": optimizer}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    rope = config.layers[0].attention.rope
    scaling = {"rope_type": "llama3", "factor": rope.scaling_factor, "low_freq_factor": rope.low_freq_factor}
    scaling |= {
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "rope_theta": float(rope.theta),
    }
    stated = SIZES | dict(
        vocab_size=2048, hidden_size=256, num_hidden_layers=6, num_attention_heads=16, num_key_value_heads=16,
        intermediate_size=768, max_position_embeddings=131072, rope_parameters=scaling,
    )  # fmt: skip
    assert_same_logits(converted("dcp", tmp_path, Llama3.from_hf_config(stated), MODELS), model, 2e-5)


def test_megatron(tmp_path: Path) -> None:
    """Its model is built and saved, but does not run, on a CPU: the values are compared, row by row."""
    theirs = written_by_megatron(tmp_path, num_layers=3, ffn_hidden_size=48)
    found = converted("megatron", tmp_path, Llama3.from_hf_config(SIZES), MODELS).state_dict()
    assert torch.equal(found["tok_embeddings.weight"], theirs["embedding.word_embeddings.weight"])
    assert torch.equal(found["output.weight"], theirs["output_layer.weight"])
    for i in range(3):
        at = f"decoder.layers.{i}"
        heads = theirs[f"{at}.self_attention.linear_qkv.weight"].view(2, 4, 8, 32)  # group, [q, q, k, v], row, column
        q, k, v = heads[:, :2].reshape(4, 8, 32), heads[:, 2], heads[:, 3]
        for name, rows in (("wq", q), ("wk", k)):
            ours = found[f"layers.{i}.attention.{name}.weight"].view(-1, 8, 32)
            assert torch.equal(ours[:, 0::2], rows[:, :4]) and torch.equal(ours[:, 1::2], rows[:, 4:])
        assert torch.equal(found[f"layers.{i}.attention.wv.weight"], v.reshape(16, 32))
        gate, up = theirs[f"{at}.mlp.linear_fc1.weight"].split(48)
        assert torch.equal(found[f"layers.{i}.feed_forward.w1.weight"], gate)
        assert torch.equal(found[f"layers.{i}.feed_forward.w3.weight"], up)
        assert torch.equal(found[f"layers.{i}.attention_norm.weight"], theirs[f"{at}.input_layernorm.weight"])
