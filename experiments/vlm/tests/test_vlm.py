"""A language model that sees: equal to LLaVA, on two ranks as on one, planned, and able to learn what it is shown."""

import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image

from core.config import cli
from core.config.errors import UserError
from core.config.recipe import recipes
from core.config.record import diff
from core.config.validate import validate
from core.nn.attention import Attention
from core.nn.init import materialise
from core.optim.groups import Group
from core.parallel.settings import Parallelism
from core.runtime.meta import meta_model
from core.testing.parity import Case, alone, largest_differences, result_of
from core.testing.ranks import run_ranks
from core.weights.folder import load_weights
from core.weights.hf import load_hf
from llama3.model import Llama3
from qwen3.configs import qwen3_0_6b, qwen3_debug
from qwen3.model import Qwen3
from vlm import caption, configs
from vlm.caption import captions
from vlm.exact import count_exact, main
from vlm.model import VLM
from vlm.shapes import drawn_pair
from vlm.trainer import VLMTrainer
from vlm.vision import SelfAttention, Vision

TOWER = Vision.Config(dim=32, n_layers=2, n_heads=2, hidden_dim=64, image_size=28, patch_size=7)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "qwen3": (Qwen3, lambda: tf.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),
    "llama3": (Llama3, lambda: tf.LlamaConfig(**SIZES, rope_theta=10000.0)),
}
IMAGE = 99


def llava(text: Any) -> Any:
    vision = tf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=TOWER.n_patches,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.2)  # biases that are not 0, norms that are not 1
            elif "vision" in name or "projector" in name:
                weight.mul_(4.0)
    return model


def taught_by(theirs: Any, family: type, folder: Path) -> VLM:
    """Our model with the weights of LLaVA, those of the decoder by way of its family's folder."""
    text = tf.AutoModelForCausalLM.from_config(theirs.config.text_config)
    text.model.load_state_dict(theirs.model.language_model.state_dict())
    text.lm_head.load_state_dict(theirs.lm_head.state_dict())
    text.save_pretrained(folder)
    stated = json.loads((folder / "config.json").read_text())
    model: VLM = meta_model(VLM.Config(decoder=family.from_hf_config(stated), vision=TOWER))
    materialise(model, torch.device("cpu"), torch.float32)
    decoder = meta_model(model.config.decoder)
    materialise(decoder, torch.device("cpu"), torch.float32)
    load_hf(decoder, folder)
    tower, projector = theirs.model.vision_tower.state_dict(), theirs.model.multi_modal_projector.state_dict()
    names = {
        "layer_norm1": "attention_norm",
        "layer_norm2": "ffn_norm",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.out_proj": "attention.wo",
        "mlp": "feed_forward",
        "encoder.layers": "layers",
        "embeddings.patch_embedding": "patches",
        "embeddings.position_embedding.weight": "position",
    }
    seen = {f"projector.{name}": value for name, value in projector.items()}
    for name, value in tower.items():
        name = name.removeprefix("vision_model.")
        if "post_layernorm" in name or name.startswith("head."):
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        seen[f"vision.{name}"] = value.flatten(1) if name == "patches.weight" else value
    model.load_state_dict({**decoder.state_dict(), **seen})
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_llava(family: str, tmp_path: Path) -> None:
    ours, text = FAMILIES[family]
    theirs = llava(text())
    model = taught_by(theirs, ours, tmp_path / "text")
    tokens_BL = torch.randint(0, IMAGE, (3, 24), generator=torch.Generator().manual_seed(1))
    for row, first in enumerate((0, 2, 8)):
        tokens_BL[row, first : first + TOWER.n_patches] = IMAGE
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(input_ids=tokens_BL, pixel_values=pixels).logits
        found = model(tokens_BL, pixels_BCSS=pixels, is_patch_BL=tokens_BL == IMAGE)
        other = model(tokens_BL, pixels_BCSS=pixels.flip(0), is_patch_BL=tokens_BL == IMAGE)
        blind = model(tokens_BL)
        written = [likeliest(theirs, pixels[row : row + 1], n=5) for row in range(3)]
        assert captions(model, pixels, limit=5, end_id=IMAGE) == written and any(written)
    assert (found - expected).abs().max() < 1e-5
    assert min((found - each).abs().max() for each in (other, blind)) > 1e-2  # each row sees its own image


def likeliest(theirs: Any, pixels_1CSS: torch.Tensor, n: int) -> list[int]:
    """The tokens that LLaVA writes for an image (1, C, S, S), the whole read for each; one that stands for images ends
    them."""
    ids = [IMAGE] * TOWER.n_patches
    for _ in range(n):
        token = int(theirs(input_ids=torch.tensor([ids]), pixel_values=pixels_1CSS).logits[0, -1].argmax())
        if token == IMAGE:
            break
        ids.append(token)
    return ids[TOWER.n_patches :]


def case(**more: Any) -> Case:
    decoder = qwen3_debug().model
    decoder.dim, decoder.n_layers, decoder.vocab_size = 32, 2, 61
    decoder.attention.n_heads, decoder.attention.n_kv_heads, decoder.attention.head_dim = 4, 2, 8
    decoder.feed_forward.hidden_dim = 48
    model: Any = VLM.Config(decoder=decoder, vision=TOWER)
    inputs = {
        "pixels_BCSS": torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(5)),
        "is_patch_BL": (torch.arange(24) < TOWER.n_patches).expand(4, -1).clone(),
    }
    return Case(model, n_rows=4, length=24, empty_rows=0, mask="causal", inputs=inputs, local_batch_size=2, **more)


def test_modes_of_checkpointing_differ_in_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One policy for tower and decoder: every block of both is run again."""
    calls: Counter[str] = Counter()
    for block in (SelfAttention, Attention):

        def counted(self: Any, *args: Any, forward: Any = block.forward) -> torch.Tensor:
            calls[type(self).__name__] += 1
            return forward(self, *args)

        monkeypatch.setattr(block, "forward", counted)
    expected, once = result_of(case()), dict(calls)
    for mode in ("selective", "full"):
        calls.clear()
        found = result_of(case(checkpoint=mode))
        assert max(largest_differences([found], expected).values()) < 1e-6
        assert calls == {name: 2 * n for name, n in once.items()} and len(once) == 2
    assert any(name.startswith("vision.layers.0") for name in expected.gradients)


@pytest.mark.layout
def test_fsdp_on_two_ranks_equals_one_rank() -> None:
    spread = case(parallelism=Parallelism(), world_size=2, checkpoint="selective")
    found = run_ranks(result_of, 2, spread, timeout_s=120.0)
    worst = largest_differences(found, result_of(alone(spread)))
    assert worst["loss"] < 1e-6 and worst["gradient"] < 1e-5 and worst["next loss"] < 1e-5, worst


def tiny_run(folder: Path) -> VLMTrainer.Config:
    config = configs.vlm_debug()
    config.training.steps, config.training.local_batch_size, config.training.device = 2, 4, "cpu"
    config.dataloader.n_shapes, config.dataloader.held_out_pairs, config.validator.steps = 40, 8, -1
    config.metrics.log_freq = config.metrics.per_layer_freq = 1
    config.lr_scheduler.warmup_steps, config.lr_scheduler.decay_ratio = 0, 0.0
    config.dump_folder = str(folder / "run")
    return config


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.built.named_parameters()}


def test_a_frozen_tower_stays_and_all_else_moves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run(tmp_path)
    config.optimizer.groups = [Group(pattern="vision.*", frozen=True)]
    trainer = config.build()
    before = weights_of(trainer)
    record, folder = trainer.run()
    still = {name for name, weight in weights_of(trainer).items() if torch.equal(weight, before[name])}
    assert still == {name for name in before if name.startswith("vision.")}
    assert record.validation_loss < math.log(2048) + 0.1
    assert {"update_norm/projector", "weight_norm/vision"} <= record.numbers.keys()
    assert "update_norm/vision" not in record.numbers
    other: Any = meta_model(qwen3_debug().model)
    with pytest.raises(UserError, match=r"holds the weights of vlm\.model:VLM, not of qwen3\.model:Qwen3"):
        load_weights(other, folder)
    main([str(folder)])
    picture, _ = drawn_pair(3, 32)
    Image.fromarray(picture).save(tmp_path / "seen.png")
    capsys.readouterr()
    caption.main([str(folder), str(tmp_path / "seen.png")])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'seen.png'}: ")
    with pytest.raises(SystemExit):
        caption.main([str(folder), str(tmp_path / "nowhere.png")])
    assert "cannot read the image" in capsys.readouterr().err


def test_a_run_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    def losses(folder: str | None) -> list[float]:
        return [json.loads(line)["loss"] for line in (Path(folder or "") / "metrics.jsonl").read_text().splitlines()]

    whole, half = tiny_run(tmp_path / "whole"), tiny_run(tmp_path / "half")
    whole.training.steps = 4
    for config in (whole, half):
        config.build().run()
    half.training.steps = 4
    half.build().run()
    assert losses(half.dump_folder) == losses(whole.dump_folder) and len(losses(half.dump_folder)) == 4


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    config.dataloader.n_patches = 4
    config.model.decoder.n_mtp_layers = 1
    for degree in ("tensor", "context", "pipeline"):
        setattr(config.parallelism, f"{degree}_parallel_degree", 2)
    with pytest.raises(UserError) as error:
        config.build()
    for words in (
        "n_patches 4 of the data and 16 of the tower: set it to 16",
        "n_mtp_layers 1: tokens further ahead are not predicted",
        "tensor_parallel_degree 2 with images",
        "context_parallel_degree 2 with images",
        "pipeline_parallel_degree 2 with images: a pipeline hands on tokens alone",
    ):
        assert words in str(error.value)


def test_a_dry_run_plans_tower_and_decoder(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", "vlm_debug", "--dry-run", "--json", "--world-size", "2", "--training.device", "cpu"]
    plans = {}
    for name, more in {"all": [], "full": ["--activation_checkpoint.mode", "full"]}.items():
        cli.main(configs, [*options, *more])
        plans[name] = json.loads(capsys.readouterr().out)
    model = meta_model(configs.vlm_debug().model)
    assert plans["all"]["model_parameters"] == sum(weight.numel() for weight in model.parameters())
    assert plans["all"]["inputs_bytes"] > 32 * 3 * 32 * 32 * 4  # the pixels of a microbatch
    assert plans["full"]["activations_bytes"] < plans["all"]["activations_bytes"]


def test_recipes_differ_from_those_that_they_are_derived_from_in_model_and_data() -> None:
    assert recipes(configs).keys() == {"vlm_debug", "vlm_qwen3_0_6b"}
    for name, base in {"vlm_debug": qwen3_debug, "vlm_qwen3_0_6b": qwen3_0_6b}.items():
        config = recipes(configs)[name]()
        validate(config)
        found = {path.split(".")[0] for path, _, _ in diff(config, base())}
        assert found <= {"class", "model", "dataloader", "training", "optimizer", "validator"}


@pytest.mark.matrix
@pytest.mark.slow
def test_it_learns_to_say_what_is_drawn(tmp_path: Path) -> None:
    """Captions of held-out pictures, which are drawn at other places and in other shades than any that it saw."""
    config = configs.vlm_debug()
    config.dump_folder = str(tmp_path)
    trainer = config.build()
    began = time.process_time()
    trainer.run()
    right, n = count_exact(trainer.built.models[0].eval(), trainer.loaders["validation"])
    print(f"{right} of {n} captions exact after {config.training.steps} steps, {time.process_time() - began:.0f} CPU s")
    assert right >= 0.9 * n
