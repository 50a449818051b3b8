import itertools
import math
from typing import Any

import pytest
import torch
from toy_run import toy_run

from core.nn.kernel import Positions, visible
from core.nn.sdpa import SDPA
from core.parallel.layout import SingleRank
from core.runtime.records import read_records
from core.step.update import StepInfo
from core.testing.toy import ToyMoE, on_cpu
from core.train.attention_logits import WatchedKernel, largest_logit
from core.train.layer_numbers import LayerNumbers, load_entropy, part_of

INFO = StepInfo(1, 1.0, 1.0, 1.0, updated=True)
CPU = torch.device("cpu")


def test_numbers_are_those_of_each_part():
    """A step that is written by hand: weights of 3 behind an update of 0.5, gradients of 2, two microbatches."""
    model = on_cpu(ToyMoE.Config(n_layers=2))
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(2.5)
    rows = torch.arange(24).view(3, 8)
    seen, logits = [], []

    @torch.no_grad()
    def take() -> StepInfo:
        block = model.get_submodule("layers.0")
        hooks = [
            block.register_forward_hook(lambda block, args, x_BLD: seen.append(x_BLD)),
            block.attention.register_forward_hook(lambda module, args, out: logits.append(plain_logits(module, *args))),
        ]
        for part in (rows[:2], rows[2:]):
            model(part)
        for hook in hooks:
            hook.remove()
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, 2.0)
            weight.fill_(3.0)
        model.get_submodule("layers.1.moe.router").tokens_E.copy_(torch.tensor([4, 4, 0, 0, 0, 0]))
        return INFO

    info, numbers = LayerNumbers([model], SingleRank(CPU), activations=True).measured(take)
    assert info is INFO
    sizes = {part: 0 for part in ("tok_embeddings", "norm", "output", "layers.0", "layers.1")}
    for name, weight in model.named_parameters():
        sizes[next(part for part in sizes if name.startswith(f"{part}."))] += weight.numel()
    for kind, value in {"weight_norm": 3.0, "gradient_norm": 2.0, "update_norm": 0.5}.items():
        for part, size in sizes.items():
            assert numbers.pop(f"{kind}/{part}") == pytest.approx(value * math.sqrt(size))
    assert numbers.pop("activation_rms/layers.0") == pytest.approx(torch.cat(seen).square().mean().sqrt().item())
    assert numbers.pop("activation_rms/layers.1") > 0
    assert numbers.pop("attention_max_logit/layers.0") == pytest.approx(max(each.max().item() for each in logits))
    assert numbers.pop("attention_max_logit/layers.1") > 0
    assert numbers.pop("router_entropy/layers.1") == pytest.approx(math.log(2) / math.log(6)) and numbers == {}


def plain_logits(attention: Any, x_BLD: torch.Tensor, rotation: Any, mask: Any) -> torch.Tensor:
    """All logits (B, N, L, L) of an attention, -inf where a query does not see a key."""
    q, k = ((w(x_BLD)).unflatten(-1, (-1, attention.head_dim)) for w in (attention.wq, attention.wk))
    q, k = rotation(attention.q_norm(q)), rotation(attention.k_norm(k)).repeat_interleave(2, dim=2)
    logits = torch.einsum("blnh,bmnh->bnlm", q, k) / math.sqrt(attention.head_dim)
    return logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -math.inf)


def test_the_largest_logit_is_that_of_pairs_that_see_each_other(monkeypatch):
    """Two documents, a window, four query heads to two of keys, a few queries at a time: against every pair by hand."""
    monkeypatch.setattr("core.train.attention_logits.MOST_PAIRS", 100)
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 9, 6, generator=draw), torch.randn(2, 2, 9, 6, generator=draw)
    document = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    seen = []
    for row, head, i, j in itertools.product(range(2), range(4), range(9), range(9)):
        logit = 0.5 * float(q[row, head, i] @ k[row, head // 2, j])
        if j <= i < j + 3 and document[row, i] == document[row, j]:
            seen.append(logit)
    positions = Positions(torch.arange(9)[None], document)
    assert largest_logit(q, k, visible(positions, 3), scale=0.5).item() == pytest.approx(max(seen))
    kernel = WatchedKernel(SDPA(3))
    mask = kernel.mask(positions)
    assert torch.equal(kernel(q, k, k, mask, scale=0.5), SDPA(3)(q, k, k, SDPA(3).mask(positions), scale=0.5))
    assert kernel.found[0].item() == pytest.approx(max(seen)) and kernel == WatchedKernel(SDPA(3)) != SDPA(3)


def test_parts_and_entropies():
    assert [part_of(name) for name in ("layers.12.ffn_norm.weight", "ahead.3.norm.weight", "output.weight")] == [
        "layers.12",
        "layers.3",
        "output",
    ]
    assert load_entropy(torch.tensor([5, 5, 5, 5])) == pytest.approx(1.0)
    assert load_entropy(torch.tensor([7, 0])) == 0.0 and load_entropy(torch.tensor([9])) == 1.0


def test_a_run_measures_when_it_is_asked_and_learns_the_same(tmp_path):
    losses = []
    for freq in (None, 2):
        run = toy_run(tmp_path, steps=5)
        run.dump_folder, run.metrics.per_layer_freq = str(tmp_path / f"every {freq}"), freq
        run.training.max_norm = 0.5
        _, folder = run.build().run()
        records = read_records(folder)
        losses.append([(record["loss"], record["grad_norm"]) for record in records])
    assert losses[0] == losses[1]
    of_layers = [sum("/layers." in name for name in record) for record in records]
    assert of_layers[0] == of_layers[2] == of_layers[4] == 0 and of_layers[1] == of_layers[3] == 2 * 5
    for record in (records[1], records[3]):
        joint = math.sqrt(sum(value**2 for name, value in record.items() if name.startswith("gradient_norm/")))
        assert joint == pytest.approx(min(record["grad_norm"], 0.5), rel=1e-4)
