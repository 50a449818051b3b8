"""Folders of other programs, written here as their formats say, against transformers. `nox -s peers` has the programs
write them."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import checkpoint as dcp
from transformers import LlamaConfig, LlamaForCausalLM

from core.checkpoint.find import find_in
from core.checkpoint.index import read_tensor
from core.config.record import to_json
from core.runtime.meta import meta_model
from core.runtime.ranks import Ranks
from core.testing.model_suite import assert_same_logits
from core.testing.toy import on_cpu, randomise
from core.weights.convert import main
from core.weights.folder import load_folder
from llama3.model import Llama3

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process writes
HEADS, GROUPS, WIDTH, LAYERS = 4, 2, 8, 3
FAMILIES: dict[str, Any] = {"llama": Llama3}


@pytest.fixture(scope="module")
def theirs() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, max_position_embeddings=64, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    randomise(model, seed=1)
    return model


def pairs(weight: Tensor) -> Tensor:
    """The rows of queries or keys as they stand where neighbours rotate together."""
    return torch.cat([head[torch.arange(WIDTH).view(2, -1).T.flatten()] for head in weight.split(WIDTH)])


def parts(model: LlamaForCausalLM, i: int) -> dict[str, Tensor]:
    """The weights of a block by short names."""
    own = {name: each.detach().clone() for name, each in model.model.layers[i].named_parameters()}
    names = "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
    names += " post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj"
    return {name.rpartition(".")[2]: own[f"{name}.weight"] for name in names.split()}


def ends(model: LlamaForCausalLM) -> list[Tensor]:
    """Embedding, last norm, head."""
    return [
        each.detach().clone()
        for each in (model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight)
    ]


def write_titan(model: LlamaForCausalLM, folder: Path) -> None:
    """torchtitan 0.3.0: our names but for the head and the three projections; neighbours rotate together."""
    state: dict[str, Any] = dict(
        zip(("tok_embeddings.weight", "norm.weight", "lm_head.weight"), ends(model), strict=True)
    )
    for i in range(LAYERS):
        p, at = parts(model, i), f"layers.{i}"
        state |= {
            f"{at}.attention_norm.weight": p["input_layernorm"],
            f"{at}.ffn_norm.weight": p["post_attention_layernorm"],
        }
        state |= {f"{at}.attention.qkv_linear.wq.weight": pairs(p["q_proj"])}
        state |= {f"{at}.attention.qkv_linear.wk.weight": pairs(p["k_proj"])}
        state |= {f"{at}.attention.qkv_linear.wv.weight": p["v_proj"], f"{at}.attention.wo.weight": p["o_proj"]}
        for name, place in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            state[f"{at}.feed_forward.{place}.weight"] = p[f"{name}_proj"]
    moments: dict[str, Any] = {}
    for name in [name for name in state if "qkv_linear.wk" not in name and "qkv_linear.wv" not in name]:
        value = state[name] * 2
        if "qkv_linear" in name:  # of each key/value head the queries, the key, the value
            of_all = [state[name.replace("wq", w)].view(GROUPS, -1, 32) for w in ("wq", "wk", "wv")]
            name, value = name.replace("wq", "wqkv"), torch.cat(of_all, 1).flatten(0, 1) * 2
        moments |= {f"state.{name}.exp_avg": value, f"state.{name}.exp_avg_sq": value + 1}
        moments |= {f"state.{name}.step": torch.tensor(3.0), f"param_groups.{name}.lr": 1e-3}
    state["optimizer"] = moments
    state |= {"train_state.step": torch.tensor(3), "lr_scheduler": {"last_epoch": 3}, "dataloader": {"dp_rank_0": b"0"}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


def write_litgpt(model: LlamaForCausalLM, folder: Path, *, pad: int = 0) -> None:
    """litgpt 0.5: queries, keys and values behind one another; halves rotate together; rows are padded."""
    embedding, norm, head = ends(model)
    more = torch.zeros(pad, 32)
    state = {"transformer.wte.weight": torch.cat([embedding, more]), "lm_head.weight": torch.cat([head, more])}
    state["transformer.ln_f.weight"] = norm
    for i in range(LAYERS):
        p, at = parts(model, i), f"transformer.h.{i}"
        state |= {f"{at}.norm_1.weight": p["input_layernorm"], f"{at}.norm_2.weight": p["post_attention_layernorm"]}
        state |= {f"{at}.attn.qkv.weight": torch.cat([p["q_proj"], p["k_proj"], p["v_proj"]])}
        state |= {f"{at}.attn.proj.weight": p["o_proj"], f"{at}.mlp.fc_1.weight": p["gate_proj"]}
        state |= {f"{at}.mlp.fc_2.weight": p["up_proj"], f"{at}.mlp.proj.weight": p["down_proj"]}
    folder.mkdir()
    torch.save({"model": state}, folder / "lit_model.pth")
    stated = "name: tiny\nn_layer: 3\nn_embd: 32\nn_head: 4\nn_query_groups: 2\nhead_size: 8\nnorm_eps: 1.0e-05\n"
    (folder / "model_config.yaml").write_text(stated + "rope_base: 10000\nrope_adjustments: null\n")


def write_megatron(model: LlamaForCausalLM, folder: Path) -> None:
    """megatron-core 0.16: all blocks along axis 0, rows by key/value head, norms by the layer behind them."""
    embedding, norm, head = ends(model)
    state: dict[str, Any] = {"embedding.word_embeddings.weight": embedding, "output_layer.weight": head}
    state["decoder.final_layernorm.weight"] = norm
    blocks: dict[str, list[Tensor]] = {}
    for i in range(LAYERS):
        p = parts(model, i)
        q, k, v = (p[name].view(GROUPS, -1, 32) for name in ("q_proj", "k_proj", "v_proj"))
        each = {
            "self_attention.linear_qkv.layer_norm_weight": p["input_layernorm"],
            "self_attention.linear_qkv.weight": torch.cat([q, k, v], 1).flatten(0, 1),
            "self_attention.linear_proj.weight": p["o_proj"],
            "mlp.linear_fc1.layer_norm_weight": p["post_attention_layernorm"],
            "mlp.linear_fc1.weight": torch.cat([p["gate_proj"], p["up_proj"]]),
            "mlp.linear_fc2.weight": p["down_proj"],
        }
        for name, value in each.items():
            blocks.setdefault(f"decoder.layers.{name}", []).append(value)
    state |= {name: torch.stack(values) for name, values in blocks.items()}
    state["optimizer.state.exp_avg.output_layer.weight"] = torch.ones(3)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    torch.save({"iteration": 3}, folder / "common.pt")


def write_nanotron(model: LlamaForCausalLM, folder: Path) -> None:
    """nanotron 0.4: a file for each tensor and rank, here two; the first cut in rows, joined ones part by part."""

    def write(name: str, value: Tensor, cuts: list[int] | None = None) -> None:
        *rooms, leaf = name.split(".")
        place = folder / "5/model" / Path(*rooms)
        place.mkdir(parents=True, exist_ok=True)
        if cuts is None:
            return save_file({"data": value}, place / f"model_{leaf}.safetensors")
        for rank in range(2):
            rows, told, at, start = [], [], 0, 0
            for size in cuts:
                half, first = size // 2, start + rank * size // 2
                rows.append(value[first : first + half])
                told.append(f"{at},{at + half},None|None,None,None#{first},{first + half},None|None,None,None")
                at, start = at + half, start + size
            about = {
                "local_global_slices_pairs": ";".join(told),
                "unsharded_shape": str(tuple(value.shape)),
                "version": "1.4",
            }
            name = f"model_{leaf}_pp-rank-0-of-1_tp-rank-{rank}-of-2.safetensors"
            save_file({"data": torch.cat(rows)}, place / name, metadata=about)

    embedding, norm, head = ends(model)
    write("model.token_position_embeddings.pp_block.token_embedding.weight", embedding, [128])
    write("model.final_layer_norm.pp_block.weight", norm)
    write("model.lm_head.pp_block.weight", head, [128])
    for i in range(LAYERS):
        p, at = parts(model, i), f"model.decoder.{i}.pp_block"
        write(f"{at}.input_layernorm.weight", p["input_layernorm"])
        write(
            f"{at}.attn.qkv_proj.weight", torch.cat([pairs(p["q_proj"]), pairs(p["k_proj"]), p["v_proj"]]), [32, 16, 16]
        )
        write(f"{at}.attn.o_proj.weight", p["o_proj"])
        write(f"{at}.post_attention_layernorm.weight", p["post_attention_layernorm"])
        write(f"{at}.mlp.gate_up_proj.weight", torch.cat([p["gate_proj"], p["up_proj"]]), [48, 48])
        write(f"{at}.mlp.down_proj.weight", p["down_proj"])
    (folder / "latest.txt").write_text("5")
    (folder / "5/model_config.json").write_text(
        json.dumps({"num_hidden_layers": 3, "rms_norm_eps": 1e-5, "rope_scaling": None})
    )


WRITERS = {"dcp": write_titan, "litgpt": write_litgpt, "megatron": write_megatron, "nanotron": write_nanotron}


def config_of(model: LlamaForCausalLM, folder: Path, **changes: Any) -> str:
    config = Llama3.from_hf_config(model.config.to_dict() | changes)
    file = folder / "model.json"
    file.write_text(to_json(config))
    return str(file)


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit):
        main(FAMILIES, [str(word) for word in words])
    return capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("peer", WRITERS)
def test_logits_are_those_of_the_model_that_was_written(peer: str, theirs: LlamaForCausalLM, tmp_path: Path) -> None:
    WRITERS[peer](theirs, tmp_path / "theirs")
    words = [f"from-{peer}", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--config", config_of(theirs, tmp_path)]
    main(FAMILIES, words)
    ours = on_cpu(Llama3.from_hf_config(theirs.config.to_dict()))
    load_folder(ours, tmp_path / "ours")
    assert_same_logits(ours, theirs, ours.config)


def test_the_state_of_the_optimizer_and_the_step(theirs: LlamaForCausalLM, tmp_path: Path) -> None:
    write_titan(theirs, tmp_path / "theirs")
    words = ["from-dcp", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--config", config_of(theirs, tmp_path)]
    main(FAMILIES, [*words, "--with-optimizer"])
    found = find_in(str(tmp_path / "ours"), Ranks())
    assert found.manifest.progress.step == 3 and found.manifest.kind == "full"
    index = found.tensors()
    stored = {name: read_tensor(found.storage, found.folder, each) for name, each in index.items()}
    weights = {name.removeprefix("model."): each for name, each in stored.items() if name.startswith("model.")}
    assert weights.keys() == dict(meta_model(Llama3.from_hf_config(theirs.config.to_dict())).named_parameters()).keys()
    for name, weight in weights.items():
        assert torch.equal(stored[f"optimizer.{name}.exp_avg"], weight * 2)
        assert torch.equal(stored[f"optimizer.{name}.exp_avg_sq"], weight * 2 + 1)
        assert stored[f"optimizer.{name}.step"] == 3
    assert len(stored) == 4 * len(weights)


def test_a_padded_vocabulary_is_kept_and_told(
    theirs: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_litgpt(theirs, tmp_path / "theirs", pad=64)
    main(
        FAMILIES,
        ["from-litgpt", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--config", config_of(theirs, tmp_path)],
    )
    assert "the vocabulary of 128 tokens is padded to 192 rows: the model has as many" in capsys.readouterr().out
    assert json.loads((tmp_path / "ours/config.json").read_text())["vocab_size"] == 192


def test_what_the_folder_says_must_agree(
    theirs: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src, dst = tmp_path / "theirs", tmp_path / "ours"
    write_litgpt(theirs, src)
    other = config_of(theirs, tmp_path, rope_parameters={"rope_theta": 5e5}, rms_norm_eps=1e-6)
    said = refusal(capsys, "from-litgpt", src, dst, "--config", other)
    assert "norm_eps is 1.0e-05, norm_eps is 1e-06" in said and "rope_base is 10000, rope.theta is 500000.0" in said
    wide = config_of(theirs, tmp_path, intermediate_size=64)
    said = refusal(capsys, "from-litgpt", src, dst, "--config", wide)
    assert "transformer.h.0.mlp.fc_1.weight has shape [48, 32], the model wants [64, 32]" in said
    biased = config_of(theirs, tmp_path, attention_bias=True)
    (tmp_path / "nanotron").mkdir()
    write_nanotron(theirs, tmp_path / "nanotron")
    said = refusal(capsys, "from-nanotron", tmp_path / "nanotron", dst, "--config", biased)
    assert "what nanotron writes has no place for weights such as layers.{i}.attention.wq.bias" in said
    assert "from-litgpt needs --config" in refusal(capsys, "from-litgpt", src, dst)
    assert "from-hf takes no --config" in refusal(capsys, "from-hf", src, dst, "--config", wide)
    assert not dst.exists()


class Bomb:
    """A pickle that runs something when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_runs_nothing(theirs: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, mark = tmp_path / "theirs", tmp_path / "mark"
    src.mkdir()
    (src / ".metadata").write_bytes(pickle.dumps(Bomb(mark)))
    config = config_of(theirs, tmp_path)
    assert f"{src}/.metadata is not understood: " in refusal(
        capsys, "from-dcp", src, tmp_path / "ours", "--config", config
    )
    (src / ".metadata").write_bytes(b"no pickle")
    assert f"{src}/.metadata is damaged: " in refusal(capsys, "from-dcp", src, tmp_path / "ours", "--config", config)
    torch.save({"model": Bomb(mark)}, src / "lit_model.pth")
    said = refusal(capsys, "from-litgpt", src, tmp_path / "ours", "--config", config)
    assert f"{src}/lit_model.pth cannot be read as tensors alone: " in said
    assert not mark.exists()


def test_files_that_are_cut_or_gone(
    theirs: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = tmp_path / "theirs"
    write_titan(theirs, src)
    config = config_of(theirs, tmp_path)
    file = src / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:5000])
    assert f"{file} cannot be read at byte " in refusal(capsys, "from-dcp", src, tmp_path / "ours", "--config", config)
    file.unlink()
    said = refusal(capsys, "from-dcp", src, tmp_path / "ours", "--config", config)
    assert f"{src} has no __0_0.distcp, which its .metadata names" in said
