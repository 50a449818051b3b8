"""Models of transformers under core's step: equal to a plain loop, in every mode, resumed, exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hf_families import APART, CHUNKED, FAMILIES
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from core.activation_checkpoint.apply import ActivationCheckpoint
from core.config.errors import UserError
from core.data.packing import IGNORE
from core.nn.weights import training_flops_per_token
from core.parallel.layout import SingleRank, Wrapping
from core.parallel.many_ranks import ManyRanks
from core.parallel.settings import Parallelism
from core.runtime.meta import meta_model
from core.step.assemble import assemble, compile_block
from core.step.loss import CrossEntropy
from core.step.objective import Objective, valid_tokens
from core.testing.parity import drawn_batch, full
from core.testing.ranks import run_ranks
from hf_models.folder import keeps_documents_apart, start_values
from hf_models.model import HFModel
from hf_models.trainer import fill


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of each family, as transformers writes it, with weights that all matter."""
    place = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        path = place / family
        if not path.exists():
            torch.manual_seed(0)
            model = tf.AutoModelForCausalLM.from_config(FAMILIES[family]())
            for name, weight in model.named_parameters():
                if weight.dim() == 1 or "bias" in name:
                    torch.nn.init.normal_(weight, mean=0.5, std=0.1)
                else:
                    weight.data.mul_(3.0)
            model.save_pretrained(path)
        return path

    return folder


def built(
    path: Path, mode: Any = "none", *, layout: Any = None, compile: str | None = None, debug: bool = False
) -> tuple[Any, Any]:
    """The model of a folder as a run has it, and its objective."""
    config = HFModel.Config(path=str(path))
    layout = layout or SingleRank(torch.device("cpu"))
    wrapping = Wrapping(
        compute_dtype=torch.float32,
        checkpoint=ActivationCheckpoint.Config(mode=mode, debug=debug).build(folder=Path()).apply,
        dispatcher=lambda group: pytest.fail("experts of transformers are not dispatched"),
        compile_block=None if compile is None else lambda block: compile_block(block, compile),
    )
    made = assemble(config, layout, wrapping, dtype=torch.float32, seed=0, n_microbatches=1)
    (model,) = made.models
    fill(model, start_values(config.path, config.attention, "weights", 0), layout)
    mask = "document" if path.name in APART else "causal"
    objective = Objective([model], CrossEntropy.Config().build(), layout=layout, dtype=torch.float32, mask=mask)
    return model, objective


def plain_loss(path: Path, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean loss of a batch and its gradients, by transformers' model alone: each document by itself, as a row, or
    each row."""
    theirs = tf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    nats = torch.zeros(())
    for row in zip(*batch[:4], strict=True):
        tokens_L, labels_L, _, documents_L = row
        documents_L = documents_L if path.name in APART else torch.zeros_like(documents_L)
        for document in documents_L.unique().tolist():
            own_L = documents_L == document
            logits_LV = theirs(input_ids=tokens_L[own_L][None]).logits[0].float()
            nats = nats + F.cross_entropy(logits_LV, labels_L[own_L], ignore_index=IGNORE, reduction="sum")
    loss = nats / valid_tokens([batch])
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in theirs.named_parameters()}


def assert_equal_gradients(model: Any, expected: dict[str, torch.Tensor], tolerance: float = 2e-5) -> None:
    found = {name: full(weight.grad) for name, weight in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        worst = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert worst < tolerance, f"{name} differs by {worst:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_a_plain_loop_in_every_mode(family: str, folders: Any) -> None:
    path = folders(family)
    batch = drawn_batch(HFModel.Config(path=str(path)), n_rows=2, length=16)
    expected, gradients = plain_loss(path, batch)
    for mode in ("none", "selective", "full"):
        model, objective = built(path, mode)
        assert (model.door is not None) == (family in CHUNKED)
        assert keeps_documents_apart(str(path), "auto") == (family in APART)
        if (family, mode) == ("gpt_oss", "selective"):
            with pytest.raises(UserError, match=r"mutated.*changed in place afterwards.*mode full or none"):
                objective.accumulate([batch], valid_tokens([batch]))
            continue
        loss, _ = objective.accumulate([batch], valid_tokens([batch]))
        assert loss == pytest.approx(expected.item(), rel=2e-6)
        assert_equal_gradients(model, gradients)


def test_a_mutated_output_that_was_kept_is_named_by_its_module(folders: Any) -> None:
    model, objective = built(folders("gpt_oss"), "selective", debug=True)
    batch = drawn_batch(model.config, n_rows=2, length=16)
    with pytest.raises(
        UserError, match=r"the output of \S+ in layers\.\d\.\S+, which was kept for backward, was changed"
    ):
        objective.accumulate([batch], valid_tokens([batch]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks the input
def test_blocks_are_compiled_each_by_itself(folders: Any) -> None:
    path = folders("llama")
    batch = drawn_batch(HFModel.Config(path=str(path)), n_rows=2, length=16)
    expected, gradients = plain_loss(path, batch)
    model, objective = built(path, "selective", compile="aot_eager")
    loss, _ = objective.accumulate([batch], valid_tokens([batch]))
    assert all(block._compiled_call_impl is not None for block in model.layers.values())
    assert loss == pytest.approx(expected.item(), rel=2e-6)
    assert_equal_gradients(model, gradients)


def step_on_ranks(paths: list[str]) -> list[dict[str, torch.Tensor]]:
    """The gradients of a batch that two ranks share, of the model of each folder, whole."""
    found = []
    for path in paths:
        layout = ManyRanks(Parallelism(), torch.device("cpu"))
        model, objective = built(Path(path), "selective", layout=layout)
        batch = drawn_batch(model.config, n_rows=4, length=16)
        n_valid = layout.sum_of_data(valid_tokens([batch.rows(2 * layout.data_rank, 2 * layout.data_rank + 2)]))
        objective.accumulate([batch.rows(2 * layout.data_rank, 2 * layout.data_rank + 2)], n_valid)
        assert all(isinstance(block, FSDPModule) for block in model.layers.values())
        found.append({name: full(weight.grad) for name, weight in model.named_parameters()})
    return found


@pytest.mark.layout
def test_fsdp_on_two_ranks_has_the_gradients_of_a_plain_loop(folders: Any) -> None:
    paths = [folders(family) for family in ("qwen3", "olmoe")]  # tied, and with experts
    for found in run_ranks(step_on_ranks, 2, [str(path) for path in paths], timeout_s=120.0):
        for path, gradients in zip(paths, found, strict=True):
            _, expected = plain_loss(path, drawn_batch(HFModel.Config(path=str(path)), n_rows=4, length=16))
            for name, gradient in expected.items():
                assert (gradients[name] - gradient).abs().max() < 2e-5 * gradient.abs().max(), name


def test_operations_are_counted_once(folders: Any) -> None:
    """Of OLMoE, of whose four experts a token is sent to two; tied weights of the head are a product, too."""
    for family, n_active in (("olmoe", 0.5), ("qwen3", 1.0), ("granite", 1.0)):
        model = meta_model(HFModel.Config(path=str(folders(family))))
        sizes = {name: weight.numel() for name, weight in model.named_parameters() if weight.dim() > 1}
        tied = model.config.tie_embeddings
        products = sum(n * (n_active if ".experts." in name else 1) for name, n in sizes.items())
        products -= 0 if tied else sizes["model.embed_tokens.weight"]
        found = training_flops_per_token(model, 10)
        assert found.matmul == 6 * products and found.attention == 3 * 3 * 4 * 64 * 10
