"""Multi-token prediction of DeepSeek-V3: against transformers, against the paper's equations, and at Hugging Face.

Letters: B rows, L length, D width, V vocabulary.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_deepseek import v3
from torch import Tensor
from transformers import DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from core.config.cli import main
from core.config.errors import UserError
from core.data.packing import IGNORE, Batch
from core.nn.decoder import Block, Decoder
from core.nn.kernel import Positions
from core.nn.mtp import Merge, Predictions
from core.nn.weights import parameter_count, training_flops_per_token, weights
from core.optim.adam import AdamW
from core.parallel.layout import SingleRank
from core.runtime.meta import meta_model
from core.step.loss import CrossEntropy
from core.step.objective import Objective, valid_tokens
from core.step.update import train_step
from core.testing.activation_checkpoint import assert_equal_gradients, checkpoint_blocks, gradients
from core.testing.model_suite import random_tokens, two_documents
from core.testing.toy import on_cpu, randomise
from core.weights.folder import hf_config, load_folder, save_weights
from core.weights.hf import load_hf, save_hf
from deepseek_v3 import configs
from deepseek_v3.model import DeepSeekV3, size

CPU = torch.device("cpu")


def build(n_mtp_layers: int = 2, **changes: Any) -> Decoder:
    """A tiny model with drawn weights, in training."""
    hf = v3(num_nextn_predict_layers=n_mtp_layers, **changes).to_dict()
    model = on_cpu(DeepSeekV3.from_hf_config(hf))
    randomise(model, seed=1)
    return model


def predict(model: Decoder, tokens_BL: Tensor, positions: Positions | None = None) -> Predictions:
    predictions = model.train()(tokens_BL, positions)
    assert isinstance(predictions, Predictions)
    return predictions


def labelled(model: Decoder) -> Batch:
    """Three rows of two documents; a fifth of the labels is left out, and those at the end of a document."""
    batch = two_documents(random_tokens(model.config))
    labels_BL = batch.tokens_BL.roll(-1, dims=1)
    labels_BL[batch.documents_BL != batch.documents_BL.roll(-1, dims=1)] = IGNORE
    labels_BL[torch.rand(labels_BL.shape, generator=torch.Generator().manual_seed(3)) < 0.2] = IGNORE
    return batch._replace(labels_BL=labels_BL)


def objective(model: Decoder, mask: Any) -> Objective:
    return Objective([model], CrossEntropy.Config().build(), layout=SingleRank(CPU), dtype=torch.float32, mask=mask)


def test_blocks_whose_weights_are_not_there_are_left_out(tmp_path: Path) -> None:
    """As in every folder that transformers writes, whose model has none and whose config.json states one."""
    DeepseekV3ForCausalLM(v3(num_nextn_predict_layers=1)).save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs/config.json").read_text())["num_nextn_predict_layers"] == 1
    said: list[str] = []
    config = hf_config(DeepSeekV3, tmp_path / "theirs", said.append)
    assert said == ["multi-token prediction: 1 of its blocks are stated, the weights of 0 are there: the model has 0"]
    load_folder(on_cpu(config), tmp_path / "theirs")
    save_hf(build(2), tmp_path / "ours")
    assert hf_config(DeepSeekV3, tmp_path / "ours", said.append).n_mtp_layers == 2 and len(said) == 1
    (tmp_path / "ours/model.safetensors").unlink()
    assert hf_config(DeepSeekV3, tmp_path / "ours").n_mtp_layers == 2


def test_a_model_with_more_blocks_takes_the_other_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A recipe may want multi-token prediction where a folder has none of it, at Hugging Face and in our form."""
    caplog.set_level("INFO", "armature")
    without = build(0)
    save_hf(without, tmp_path / "hf")
    save_weights(without, tmp_path / "ours")
    for number, folder in enumerate((tmp_path / "hf", tmp_path / "ours"), start=1):
        model = build(1)
        randomise(model, seed=2)
        drawn = {name: weight.clone() for name, weight in model.state_dict().items()}
        load_folder(model, folder)
        assert caplog.text.count("weights of multi-token prediction: they are not loaded") == number
        expected = drawn | without.state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_blocks_for_multi_token_prediction_are_there_whole_or_not(tmp_path: Path) -> None:
    save_hf(build(1), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    last = build(0).config.n_layers
    del stored[f"model.layers.{last}.enorm.weight"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"model.layers.{last}.enorm.weight is missing"):
        load_folder(build(1), tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("n_mtp_layers", [1, 2, 3])
def test_logits_follow_the_equations(n_mtp_layers: int) -> None:
    """Equations 21 to 23 of arXiv:2412.19437, token by token that there is: the last ones have none ahead of them.

    As in the published weights, the embedding comes first in the concatenation, and the representation of the main
    model is what its head reads.
    """
    model = build(n_mtp_layers)
    tokens_BL = random_tokens(model.config)
    found = predict(model, tokens_BL)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + model.config.norm_eps).sqrt() * weight

    def block(i: int, x_BLD: Tensor) -> Tensor:
        return model.layers[str(i)](x_BLD, model.rope(torch.arange(x_BLD.shape[1])[None]), None)

    weights = dict(model.named_parameters())
    embedding, head = weights["tok_embeddings.weight"], weights["output.weight"]
    h_BLD = embedding[tokens_BL]
    for i in range(model.config.n_layers):
        h_BLD = block(i, h_BLD)
    h_BLD = norm(h_BLD, weights["norm.weight"])
    torch.testing.assert_close(found.main, h_BLD @ head.T, rtol=0, atol=1e-5)
    assert len(found.further) == n_mtp_layers
    for k, further_BLV in enumerate(found.further, start=1):
        i = model.config.n_layers + k - 1
        of_next = norm(embedding[tokens_BL[:, k:]], weights[f"ahead.{i}.enorm.weight"])
        before = norm(h_BLD[:, :-1], weights[f"ahead.{i}.hnorm.weight"])
        joined = torch.cat((of_next, before), -1) @ weights[f"ahead.{i}.eh_proj.weight"].T
        h_BLD = norm(block(i, joined), weights[f"ahead.{i}.norm.weight"])
        torch.testing.assert_close(further_BLV[:, :-k], h_BLD @ head.T, rtol=0, atol=1e-5)


class WithBlocksAhead(DeepseekV3ForCausalLM):
    """The model of transformers, which knows blocks for multi-token prediction behind block 61 alone."""

    _keys_to_ignore_on_load_unexpected = [r"model\.layers\.[23]\..*"]


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"first_k_dense_replace": 2, "q_lora_rank": None}], ids=["sparse", "dense"])
def test_logits_equal_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    """Its blocks for multi-token prediction, read from our export. They count positions from the token ahead."""
    model = build(2, **changes)
    save_hf(model, tmp_path)
    theirs, report = WithBlocksAhead.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    ahead = MtpModel.from_pretrained(theirs.eval()).eval()
    tokens_BL = random_tokens(model.config)
    found = predict(model, tokens_BL)
    h_BLD = theirs.model(tokens_BL).last_hidden_state
    assert len(ahead.layers) == 2
    for k, further_BLV in enumerate(found.further, start=1):
        positions_BL = torch.arange(k, tokens_BL.shape[1])[None]
        h_BLD = ahead.forward_layer(k - 1, h_BLD[:, :-1], positions_BL, None, input_ids=tokens_BL[:, k:])
        expected_BLV = theirs.lm_head(h_BLD)
        assert expected_BLV.std() > 0.1
        torch.testing.assert_close(further_BLV[:, :-k], expected_BLV, rtol=0, atol=1e-5)


@torch.no_grad()
def test_only_training_predicts_further() -> None:
    """Otherwise the model is the one without those blocks, to the last bit."""
    model = build()
    plain = on_cpu(DeepSeekV3.from_hf_config(v3().to_dict())).eval()
    of_both = {name: value for name, value in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(of_both)
    tokens_BL = random_tokens(model.config)
    assert torch.equal(model.eval()(tokens_BL), plain(tokens_BL))
    assert torch.equal(predict(model, tokens_BL).main, plain(tokens_BL))


@torch.no_grad()
@pytest.mark.parametrize("mask", ["causal", "document"])
@pytest.mark.parametrize("n_mtp_layers", [1, 2])
def test_loss_equals_a_plain_loop(n_mtp_layers: int, mask: str) -> None:
    model = build(n_mtp_layers)
    batch = labelled(model)
    positions = Positions(batch.positions_BL, batch.documents_BL) if mask == "document" else None
    predictions = predict(model, batch.tokens_BL, positions)
    documents = batch.documents_BL.tolist()
    sums, counts = [], []
    for ahead, logits_BLV in enumerate((predictions.main, *predictions.further)):
        total, count = 0.0, 0
        for row, labels in enumerate(batch.labels_BL.tolist()):
            for i in range(len(labels) - ahead):
                label = labels[i + ahead]
                same = documents[row][i] == documents[row][i + ahead]
                if label != IGNORE and (same or mask == "causal"):
                    total -= logits_BLV[row, i].double().log_softmax(-1)[label].item()
                    count += 1
        sums.append(total)
        counts.append(count)
    loss = objective(model, mask)(batch)
    assert all(counts) and len(set(counts)) == len(counts)
    assert loss.main.item() == pytest.approx(sums[0], rel=1e-6)
    assert loss.total.item() == pytest.approx(sums[0] + 0.3 * sum(sums[1:]) / n_mtp_layers, rel=1e-6)
    assert objective(model.eval(), mask)(batch).total.item() == pytest.approx(sums[0], rel=1e-6)


def test_a_step_reports_both_losses() -> None:
    """Of the next token alone, and with the weighted loss of those further on; however the step is split."""
    model = build()
    batch = labelled(model)
    loss, n_valid = objective(model, "document")(batch), valid_tokens([batch])
    rows = [batch.rows(i, i + 1) for i in range(len(batch.tokens_BL))]
    optimizer = AdamW.Config().build(weights=weights(model), layout=SingleRank(torch.device("cpu")))
    settings: dict[str, Any] = {"step": 1, "lr_factor": 0.0, "max_norm": 1.0, "on_nonfinite": "stop"}
    info = train_step(objective(model, "document"), optimizer, rows, **settings)
    assert info.loss == pytest.approx(loss.main.item() / n_valid, rel=1e-6)
    assert info.total_loss == pytest.approx(loss.total.item() / n_valid, rel=1e-6)
    assert info.total_loss > info.loss + 1


@torch.no_grad()
def test_packed_documents_equal_single_ones() -> None:
    model = build()
    batch = two_documents(random_tokens(model.config))
    packed = predict(model, batch.tokens_BL, Positions(batch.positions_BL, batch.documents_BL))
    for row, (tokens_L, documents_L) in enumerate(zip(batch.tokens_BL, batch.documents_BL, strict=True)):
        for number in (0, 1):
            of_one = documents_L == number
            alone = predict(model, tokens_L[of_one][None])
            for k, (found, expected) in enumerate(zip(packed.further, alone.further, strict=True), start=1):
                torch.testing.assert_close(found[row][of_one][:-k], expected[0, :-k], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask", ["causal", "document"])
def test_checkpointing_changes_no_gradient(mask: str) -> None:
    def run(mode: str) -> dict[str, Tensor]:
        model = build()
        checkpoint_blocks(model, mode)
        return gradients(model, lambda: objective(model, mask)(labelled(model)).total)

    expected = run("none")
    assert any(name.startswith("layers.3.moe.experts") for name in expected)
    for mode in ("selective", "full"):
        assert_equal_gradients(run(mode), expected)


MERGED = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
COPIED = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


def test_names_at_hugging_face(tmp_path: Path) -> None:
    """As in the published folders, where the last block repeats the embedding and the head."""
    model = build(1)
    save_hf(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    last = {key.removeprefix("model.layers.2."): value for key, value in stored.items() if "layers.2." in key}
    usual = {key.removeprefix("model.layers.1.") for key in stored if "layers.1." in key}
    assert last.keys() == usual | set(MERGED) | COPIED.keys()
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    merge, block = model.ahead["2"], model.layers["2"]
    assert isinstance(merge, Merge) and isinstance(block, Block) and block.moe is not None
    for key, weight in zip(MERGED, (merge.enorm, merge.hnorm, merge.eh_proj, merge.norm), strict=True):
        assert torch.equal(last[key], weight.weight)
    for key, main_key in COPIED.items():
        assert torch.equal(last[key], stored[main_key])
    assert torch.equal(last["mlp.experts.3.up_proj.weight"], block.moe.experts.w3.weight[3])
    again = build(1)
    randomise(again, seed=9)
    load_hf(again, tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("key", COPIED)
def test_copies_must_equal_what_they_repeat(key: str, tmp_path: Path) -> None:
    model = build(1)
    save_hf(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    name = f"model.layers.2.{key}"
    save_file({other: value for other, value in stored.items() if other != name}, tmp_path / "model.safetensors")
    load_hf(model, tmp_path)
    save_file({**stored, name: stored[name] + 1e-3}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=name):
        load_hf(model, tmp_path)


def test_tied_head_is_repeated_too(tmp_path: Path) -> None:
    model = build(1, tie_word_embeddings=True)
    save_hf(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["model.layers.2.shared_head.head.weight"], stored["model.embed_tokens.weight"])
    again = build(1, tie_word_embeddings=True)
    randomise(again, seed=9)
    load_hf(again, tmp_path)
    assert torch.equal(again.output.weight, model.output.weight)


def test_blocks_ahead_can_be_left_out(tmp_path: Path) -> None:
    """A model without them reads a folder that has them."""
    model = build(2)
    save_hf(model, tmp_path)
    plain = on_cpu(DeepSeekV3.from_hf_config(v3().to_dict())).eval()
    load_hf(plain, tmp_path)
    tokens_BL = random_tokens(model.config)
    assert torch.equal(plain(tokens_BL), model.eval()(tokens_BL))


def test_missing_blocks_ahead_are_an_error(tmp_path: Path) -> None:
    plain = on_cpu(DeepSeekV3.from_hf_config(v3().to_dict()))
    save_hf(plain, tmp_path)
    with pytest.raises(UserError, match=r"model\.layers\.2\.enorm\.weight"):
        load_hf(build(1), tmp_path)


def test_published_size() -> None:
    """DeepSeek counts 14 billion weights behind block 60, embedding and head, 0.9 billion each, among them."""
    config = configs.deepseek_v3_671b_mtp().model
    plain, model = meta_model(size("671B")), meta_model(config)
    own = parameter_count(model) - parameter_count(plain)
    experts, attention = (
        256 * 3 * 7168 * 2048,
        7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128**2 * 7168,
    )
    norms = 2 * 7168 + 1536 + 512 + 3 * 7168
    assert own == experts + 3 * 7168 * 2048 + 256 * 7168 + attention + 2 * 7168 * 7168 + norms == 11_610_067_968
    assert round((own + 2 * 129_280 * 7168) / 1e9, 1) == 13.5
    added = training_flops_per_token(model, 4096).matmul - training_flops_per_token(plain, 4096).matmul
    # every matrix of the block that a token meets, the merge, and the head once more
    sparse = 256 * 7168 + 3 * 7168 * 2048 * 9
    assert added == 6 * (attention + sparse + 2 * 7168 * 7168 + 129_280 * 7168)


def test_option_of_the_debug_recipe(tmp_path: Path) -> None:
    """--model.n_mtp_layers 1: its block is routed, counted and balanced like the others."""
    text = tmp_path / "text.txt"
    text.write_text((Path(__file__).read_text() + "\n\n") * 3)
    run = tmp_path / "run"
    settings = {
        "model.n_mtp_layers": "1",
        "model.n_layers": "2",
        "training.steps": "2",
        "training.seq_len": "32",
        "training.local_batch_size": "2",
        "training.device": "cpu",
        "metrics.log_freq": "1",
        "lr_scheduler.warmup_steps": "1",
        "dataloader.dataset": str(text),
        "dataloader.cache_folder": str(tmp_path / "cache"),
        "dump_folder": str(run),
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    main(configs, ["--config", "deepseek_v3_debug", "--validator.no-enable", *words])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["moe/layers.1/max_over_mean_load"] >= 1 and row["moe/layers.2/max_over_mean_load"] >= 1
    assert rows[0]["mtp_loss"] == pytest.approx(math.log(2048) * 31 / 32, abs=0.2)  # the last label has none ahead
