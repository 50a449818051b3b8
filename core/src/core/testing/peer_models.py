"""Models of other programs beside ours: the same weights, the same logits."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from core.config.record import to_json
from core.nn.decoder import Decoder
from core.testing.toy import on_cpu
from core.weights.convert import main
from core.weights.folder import load_folder
from core.weights.hf_model import HFModel

MEGATRON = """
import json, os, sys, torch

if __name__ == "__main__":
    folder = sys.argv[1]
    torch.cuda.synchronize, torch.cuda.current_device = lambda *_: None, lambda: "cpu"  # it asks a GPU when it saves
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(1, 1)
    config = TransformerConfig(
        **json.loads(sys.argv[3]), use_cpu_initialization=True, add_bias_linear=False, gated_linear_unit=True,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu, layernorm_epsilon=1e-5, bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    ahead = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if config.mtp_num_layers else None
    model = GPTModel(
        config, spec, vocab_size=128, max_sequence_length=64, mtp_block_spec=ahead,
        position_embedding_type="rope", share_embeddings_and_output_weights=False,
    )
    for number, weight in enumerate(model.parameters()):
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(number))
    os.mkdir(folder)
    metadata = {"singleton_local_shards": bool(int(sys.argv[4]))}
    dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), folder)
    torch.save({name: each for name, each in model.state_dict().items() if each is not None}, sys.argv[2])
"""


def written_by_megatron(folder: Path, *, alone: bool = False, **sizes: object) -> dict[str, Tensor]:
    """The weights of a drawn model of megatron-core, of the width 32 with 4 heads of 8 in 2 groups, by its names; they
    lie in `theirs` as it saved them, `alone` with experts and halves one by one. It is built and saved, but does not
    run, on a CPU."""
    (folder / "write.py").write_text(MEGATRON)
    heads = {"hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8}
    places = [str(folder / name) for name in ("write.py", "theirs", "state.pt")]
    words = [sys.executable, *places, json.dumps({**heads, **sizes}), str(int(alone))]
    done = subprocess.run(
        words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "state.pt", weights_only=True)


def converted(peer: str, folder: Path, config: Decoder.Config, models: Mapping[str, type[HFModel]]) -> Decoder:
    """The model that `convert from-PEER` of one of these families makes of what lies in `theirs`."""
    (folder / "model.json").write_text(to_json(config))
    words = [f"from-{peer}", str(folder / "theirs"), str(folder / "ours"), "--config", str(folder / "model.json")]
    main(models, words)
    model = on_cpu(config)
    load_folder(model, folder / "ours")
    return model.eval()


@torch.no_grad()
def draw(model: nn.Module, std: float) -> None:
    """Fill the weights of a model: with numbers around 0, those of vectors around 1."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * std + (weight.dim() == 1))


@torch.no_grad()
def assert_same_logits(ours: Decoder, theirs: nn.Module, atol: float) -> None:
    """That two models, turned to fp64, make the same of some tokens: fp32's rounding hides nothing that differs."""
    tokens_BL = torch.randint(0, ours.config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(2))
    expected = theirs.double()(tokens_BL)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.double()(tokens_BL), expected, rtol=0, atol=atol)
