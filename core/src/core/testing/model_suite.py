"""What every model must pass: a model's test file fills in one class, and pytest runs these tests on its model.

Letters: B rows, L length, V vocabulary.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor

from core.activation_checkpoint.meter import Meter
from core.activation_checkpoint.ops import saved_ops
from core.config.golden import golden_texts
from core.config.recipe import recipes
from core.config.record import from_json, to_json
from core.config.validate import validate
from core.data.packing import Batch
from core.data.text import IndexedText
from core.data.tokenizer import Tokenizer
from core.nn.decoder import Decoder
from core.nn.kernel import Positions
from core.nn.module import Flops
from core.nn.weights import parameter_count, training_flops_per_token, weights
from core.parallel.settings import Parallelism
from core.runtime.meta import meta_model
from core.step.checks import expert_parts
from core.testing.activation_checkpoint import assert_equal_gradients, checkpoint_blocks, gradients, heavy_ops, products
from core.testing.command_suite import CommandSuite
from core.testing.layout_suite import LayoutSuite
from core.testing.oracles import cross_entropy
from core.testing.resume_suite import ResumeSuite
from core.testing.step_suite import StepSuite
from core.testing.toy import on_cpu, randomise
from core.train.trainer import Trainer
from core.weights.hf import load_hf, save_hf

FLOPS_SEQ_LEN = 4096


class ModelSuite(CommandSuite, LayoutSuite, ResumeSuite, StepSuite):
    """The tests of a model package: derive a class named Test... and fill in its attributes, its parents' too."""

    configs: ClassVar[ModuleType]
    """The module of its recipes; those of other models of the package are left to their own suite."""
    debug: ClassVar[str]
    """The recipe that must learn on a CPU."""
    golden: ClassVar[Path]
    """The folder of the recipes' golden texts."""
    parameters: ClassVar[dict[str, int]]
    """The published number of parameters of every size."""
    flops: ClassVar[dict[str, Flops]]
    """Training FLOPs per token of every size in rows of FLOPS_SEQ_LEN tokens, worked out by hand."""
    products: ClassVar[dict[Any, str]]
    """Linear layers of a block in the order of forward, for each kind of block that there is; selective checkpointing
    repeats those with a star."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test for every size, tiny configuration and recipe, where a test asks for one."""
        *others, last = self.recipes()  # a plan takes seconds: every test run makes one, `nox -s matrix` all
        choices = {
            "size": self.sizes,
            "tiny": self.hf_configs,
            "recipe": [*others, last],
            "planned": [*(pytest.param(name, marks=pytest.mark.matrix) for name in others), last],
            "layout": self.layout_parameters(),
        }
        for argument, names in choices.items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, names)

    def test_parameter_count(self, size: str) -> None:
        assert parameter_count(meta_model(self.sizes[size])) == self.parameters[size]

    def test_flops_per_token(self, size: str) -> None:
        counted = training_flops_per_token(meta_model(self.sizes[size]), FLOPS_SEQ_LEN)
        assert counted == self.flops[size], f"counted {counted}, worked out by hand {self.flops[size]}"

    def test_every_weight_names_its_axes(self, size: str) -> None:
        model = meta_model(self.sizes[size])
        named = {weight.name: weight.axes for weight in weights(model)}
        assert named.keys() == dict(model.named_parameters()).keys()
        for name, axes in named.items():
            assert len(axes) == model.get_parameter(name).dim() and all(axes), f"{name}: {axes}"

    def test_hf_config_round_trip(self, size: str) -> None:
        stated = json.loads(json.dumps(meta_model(self.sizes[size]).to_hf_config()))
        assert self.decoder.from_hf_config(stated) == self.sizes[size]

    def test_reads_hugging_face(self, tiny: str, tmp_path: Path) -> None:
        theirs = self.hf_model(deepcopy(self.hf_configs[tiny])).eval()
        randomise(theirs, seed=1)
        theirs.save_pretrained(tmp_path)
        config = self.decoder.from_hf_config(json.loads((tmp_path / "config.json").read_text()))
        validate(config)
        ours = on_cpu(config)
        load_hf(ours, tmp_path)
        assert_same_logits(ours, theirs, config)

    def test_hugging_face_reads_ours(self, tiny: str, tmp_path: Path) -> None:
        config = self.tiny_config(tiny)
        ours = on_cpu(config)
        randomise(ours, seed=2)
        save_hf(ours, tmp_path)
        theirs, report = self.hf_model.from_pretrained(tmp_path, output_loading_info=True)
        wrong = {kind: keys for kind, keys in report.items() if keys}
        assert not wrong, f"transformers reports {wrong}"
        assert_same_logits(ours, theirs.eval(), config)

    def test_embedding_gradient_equals_hugging_face(self, tiny: str, tmp_path: Path) -> None:
        config = self.tiny_config(tiny)
        ours = on_cpu(config)
        randomise(ours, seed=6)
        save_hf(ours, tmp_path)
        theirs = self.hf_model.from_pretrained(tmp_path)
        tokens_BL = random_tokens(config)
        labels_BL = tokens_BL.roll(-1, dims=1)
        cross_entropy(ours.eval()(tokens_BL), labels_BL).backward()
        cross_entropy(theirs(tokens_BL).logits, labels_BL).backward()
        expected, found = theirs.get_input_embeddings().weight.grad, ours.get_parameter("tok_embeddings.weight").grad
        assert expected is not None and expected.abs().max() > 0.1
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    def test_every_weight_gets_a_gradient(self, tiny: str) -> None:
        config = self.tiny_config(tiny)
        model = on_cpu(config)
        tokens_BL = random_tokens(config)
        cross_entropy(model(tokens_BL), tokens_BL.roll(-1, dims=1)).backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None and weight.grad.isfinite().all(), f"{name}: {weight.grad}"
            assert weight.grad.any(), f"{name}: the gradient is zero everywhere"

    @pytest.mark.parametrize("mask", ["causal", "document"])
    def test_checkpointing_changes_no_gradient(self, tiny: str, mask: str) -> None:
        expected = gradients(*self.training(tiny, "none", mask))
        for mode in ("selective", "full"):
            assert_equal_gradients(gradients(*self.training(tiny, mode, mask)), expected)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks the input
    @pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be")  # dynamo makes one
    def test_compiled_checkpointing_gives_the_same_gradients(self) -> None:
        """As without checkpointing, of the same operations: eager blocks on a CPU have forms of their own."""
        found = []
        for mode, backend in (("none", "eager"), ("selective", "aot_eager"), ("full", "aot_eager")):
            torch._dynamo.reset()
            model, loss = self.training(next(iter(self.hf_configs)), mode, "document")
            for block in model.layers.values():
                block.compile(backend=backend, fullgraph=True)
            found.append(gradients(model, loss))
        for name, expected in found[0].items():
            for compiled in found[1:]:
                torch.testing.assert_close(compiled[name], expected, rtol=1e-4, atol=1e-6, msg=name)
        torch._dynamo.reset()

    def test_checkpointing_saves_fewer_bytes(self, tiny: str) -> None:
        saved = []
        for mode in ("none", "selective", "full"):
            _, loss = self.training(tiny, mode)
            with Meter() as meter:
                result = loss()
            saved.append(meter.alive)
            del result
        assert saved[0] > saved[1] > saved[2] > 0

    def test_heavy_operations_are_on_the_list(self, tiny: str) -> None:
        _, loss = self.training(tiny, "none")
        heavy = heavy_ops(loss)
        assert heavy and heavy <= saved_ops(), f"not in core.activation_checkpoint.ops: {heavy - saved_ops()}"

    def test_checkpointing_repeats_every_second_product(self, tiny: str) -> None:
        found = products(*self.training(tiny, "selective"))
        for number in range(self.tiny_config(tiny).n_layers):
            block = {name: again for name, again in found.items() if name.startswith(f"layers.{number}.")}
            written = " ".join(name.rpartition(".")[2] + "*" * again for name, again in block.items())
            assert written in self.products.values(), f"block {number}"

    @torch.no_grad()
    def test_document_mask_stops_leaks(self, tiny: str) -> None:
        config = self.tiny_config(tiny)
        model = on_cpu(config)
        randomise(model, seed=3)
        batch = two_documents(random_tokens(config))
        first_BL = batch.documents_BL == 0
        changed_BL = torch.where(first_BL, (batch.tokens_BL + 1) % config.vocab_size, batch.tokens_BL)
        positions = Positions(batch.positions_BL, batch.documents_BL)
        leak_BLV = (model(batch.tokens_BL, positions) - model(changed_BL, positions))[~first_BL].abs()
        assert leak_BLV.max() < 1e-6, f"document 2 moved by {leak_BLV.max():.1e} when document 1 changed"
        seen_BLV = (model(batch.tokens_BL) - model(changed_BL))[~first_BL].abs()
        assert seen_BLV.max() > 1e-3, "without the mask document 2 must see document 1"

    @torch.no_grad()
    def test_packed_documents_equal_single_ones(self, tiny: str) -> None:
        config = self.tiny_config(tiny)
        model = on_cpu(config)
        randomise(model, seed=4)
        batch = two_documents(random_tokens(config))
        packed_BLV = model(batch.tokens_BL, Positions(batch.positions_BL, batch.documents_BL))
        for tokens_L, documents_L, packed_LV in zip(batch.tokens_BL, batch.documents_BL, packed_BLV, strict=True):
            for number in (0, 1):
                alone_LV = model(tokens_L[documents_L == number][None])[0]
                torch.testing.assert_close(packed_LV[documents_L == number], alone_LV, rtol=0, atol=1e-5)

    def test_recipe_is_valid_and_data(self, recipe: str) -> None:
        config = self.run_config(recipe)
        validate(config)
        assert from_json(to_json(config)) == config

    def test_recipe_equals_its_golden_text(self, recipe: str) -> None:
        file = self.golden / f"{recipe}.txt"
        found = file.read_text(encoding="utf-8") if file.exists() else None
        update = f"python -m core.config.golden {self.configs.__name__} {self.golden}"
        assert found == golden_texts(self.configs)[recipe], f"{file} is not what the recipe says; to update: {update}"

    def test_every_golden_text_has_a_recipe(self) -> None:
        assert {file.stem for file in self.golden.glob("*.txt")} == recipes(self.configs).keys()

    def test_recipe_runs_offline(self, recipe: str) -> None:
        config = self.run_config(recipe)
        assert (config.dataloader, config.tokenizer) == (IndexedText.Config(), Tokenizer.Config())
        assert config.tokenizer.build().vocab_size <= config.model.vocab_size

    def test_recipe_can_be_planned(self, planned: str) -> None:
        config = self.run_config(planned)
        sparse = bool(expert_parts(config.model))
        degrees = {"tensor_parallel_degree": 2 - config.compile.enable, "expert_parallel_degree": 8 if sparse else 1}
        config.parallelism = Parallelism(**degrees)
        plan = Trainer.plan(config, world_size=16, rank=0)
        assert plan.parameters == pytest.approx(plan.model_parameters / 16, rel=0.1)
        assert plan.peak_bytes > plan.weights_bytes + plan.gradients_bytes + plan.optimizer_bytes
        assert 1 < plan.flops / plan.model_flops < 2, "attention's scores and checkpointed blocks come twice"
        assert {part.axis for part in plan.traffic} >= {"shard", *["expert"] * sparse}

    def test_loss_falls_on_real_text(self, tmp_path: Path) -> None:
        (tmp_path / "topics.txt").write_text("\n".join(topics.values()), encoding="utf-8")
        config = self.run_config(self.debug)
        config.model.n_layers = 2
        config.training = replace(config.training, steps=30, seq_len=64, local_batch_size=8, device="cpu")
        config.lr_scheduler.warmup_steps = 5
        config.validator.enable = False
        config.metrics.log_freq = 1
        config.dataloader.dataset = str(tmp_path / "topics.txt")
        config.dataloader.validation_fraction = 0.0
        config.dataloader.cache_folder = str(tmp_path / "cache")
        losses = losses_of(config, tmp_path / "run")
        at_end = sum(losses[-5:]) / 5
        assert at_end < losses[0] - 1.0, f"loss went from {losses[0]:.2f} to {at_end:.2f}"

    def training(self, tiny: str, mode: str, mask: str = "causal") -> tuple[Decoder, Callable[[], Tensor]]:
        """A model with drawn weights whose blocks are checkpointed, and its loss on three rows of two documents."""
        config = self.tiny_config(tiny)
        model = on_cpu(config)
        randomise(model, seed=5)
        checkpoint_blocks(model, mode)
        batch = two_documents(random_tokens(config))
        positions = Positions(batch.positions_BL, batch.documents_BL) if mask == "document" else None
        return model, lambda: cross_entropy(model(batch.tokens_BL, positions), batch.tokens_BL.roll(-1, dims=1))

    def recipes(self) -> list[str]:
        """Names of the recipes whose model is this suite's."""
        found = recipes(self.configs).items()
        return [name for name, recipe in found if isinstance(cast(Trainer.Config, recipe()).model, self.decoder.Config)]


def random_tokens(config: Decoder.Config) -> Tensor:
    """Three rows of token ids (B, L), at most 40 long."""
    shape = 3, min(40, config.max_seq_len)
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def two_documents(tokens_BL: Tensor) -> Batch:
    """Each row as two documents, cut at another place in every row."""
    n_rows, length = tokens_BL.shape
    cut_B1 = torch.tensor([(i + 1) * length // (n_rows + 1) for i in range(n_rows)])[:, None]
    index_BL = torch.arange(length).expand(n_rows, length)
    second_BL = index_BL >= cut_B1
    return Batch(tokens_BL, tokens_BL, torch.where(second_BL, index_BL - cut_B1, index_BL), second_BL.long())


@torch.no_grad()
def assert_same_logits(ours: Decoder, theirs: Any, config: Decoder.Config) -> None:
    """Logits of both models within 1e-5 on random tokens, and large enough for that to mean something."""
    tokens_BL = random_tokens(config)
    expected_BLV = theirs(tokens_BL).logits
    assert expected_BLV.std() > 0.1
    torch.testing.assert_close(ours.eval()(tokens_BL), expected_BLV, rtol=0, atol=1e-5)


def losses_of(config: Trainer.Config, folder: Path) -> list[float]:
    """The logged losses of a run of `config` in `folder`."""
    config.dump_folder = str(folder)
    validate(config)
    config.build().run()
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
