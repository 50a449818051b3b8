"""Folders of peft's that are not what a model can take, and settings that change what adapters are multiplied by."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from core.config.errors import UserError
from core.runtime.meta import meta_model
from core.testing.toy import Toy, on_cpu
from core.weights.companions import published_companions, read_companions, stated_ids, tokenizer_in
from core.weights.folder import load_folder, merged_peft
from core.weights.hf import save_hf

QUERY = "base_model.model.model.blocks.0.q"


def peft_folder(folder: Path, *, name: str = QUERY, rank: int = 2, **stated: Any) -> Path:
    """A folder with one adapter of a toy, whose own weights lie beside it."""
    model = on_cpu(Toy.Config(), seed=3)
    if not (folder / "base").exists():
        save_hf(model, folder / "base")
    (folder / "peft").mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "base"), "r": rank, "lora_alpha": 6.0}
    (folder / "peft/adapter_config.json").write_text(json.dumps({**settings, **stated}))
    n_out, n_in = model.layers["0"].attention.wq.weight.shape
    tensors = {f"{name}.lora_A.weight": torch.ones(rank, n_in), f"{name}.lora_B.weight": torch.ones(n_out, rank)}
    save_file(tensors, folder / "peft/adapter_model.safetensors")
    return folder / "peft"


@pytest.mark.parametrize(
    ("stated", "added"),
    [
        ({}, 6.0),  # alpha / r, times the rank of ones
        ({"use_rslora": True}, 6.0 / 2**0.5 * 2),
        ({"alpha_pattern": {"0.q": 4.0}}, 4.0),
        ({"alpha_pattern": {"0.k": 4.0}}, 6.0),
    ],
)
def test_an_adapter_is_multiplied_as_peft_does(tmp_path: Path, stated: dict[str, Any], added: float) -> None:
    model, before = on_cpu(Toy.Config()), on_cpu(Toy.Config(), seed=3)
    load_folder(model, peft_folder(tmp_path, **stated))
    for name, weight in model.named_parameters():
        more = added if name == "layers.0.attention.wq.weight" else 0.0
        torch.testing.assert_close(weight, before.get_parameter(name) + more, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"peft_type": "IA3"}, r"adapter_config\.json has peft_type IA3, which is not read: merge with peft first"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save, which is not read"),
        ({"bias": "all"}, r"has bias all, which is not read"),
        ({"init_lora_weights": "pissa"}, r"has init_lora_weights pissa, which is not read"),
        ({"alora_invocation_tokens": [5]}, r"has alora_invocation_tokens, which is not read"),
        ({"base_model_name_or_path": "Qwen/Qwen3"}, r"base_model_name_or_path Qwen/Qwen3 is no folder here: write"),
        (
            {"name": QUERY.replace("0.q", "0.z")},
            r"0\.z\.lora_A\.weight, .* is of no weight in .*base",
        ),
    ],
)
def test_what_is_not_read_is_told(tmp_path: Path, settings: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError, match=error):
        merged_peft(meta_model(Toy.Config()), peft_folder(tmp_path, **settings))


def test_a_folder_without_tensors_is_told(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors cannot be read: "):
        merged_peft(meta_model(Toy.Config()), folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"peft has no adapter_model\.safetensors"):
        merged_peft(meta_model(Toy.Config()), folder)


def test_the_tokenizer_is_that_of_the_adapters_or_of_their_base(tmp_path: Path) -> None:
    """A tokenizer is all its files: none of the base's is mixed with those of the adapters."""
    folder, base = peft_folder(tmp_path), tmp_path / "base"
    files = {
        "tokenizer.model": b"pieces",
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ base }}",
        "generation_config.json": b'{"eos_token_id": 3}',
        "LICENSE": b"free",
    }
    for name, content in files.items():
        (base / name).write_bytes(content)
    (folder / "chat_template.jinja").write_text("{{ no tokenizer }}")
    assert tokenizer_in(folder) == base / "tokenizer.model" and read_companions(folder) == files
    (folder / "tokenizer.json").write_bytes(b"{}")
    assert tokenizer_in(folder) == folder / "tokenizer.json"
    found = published_companions(folder)
    assert found.keys() == {"tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"}
    assert found["chat_template.jinja"] == b"{{ no tokenizer }}"
    assert json.loads(found["generation_config.json"]) == {"eos_token_id": 3}
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert json.loads(published_companions(folder)["generation_config.json"]) == {"eos_token_id": [7, 3]}
    assert stated_ids(folder)["eos_token_id"] == [7, 3]
