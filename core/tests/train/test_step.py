"""A step's gradient is that of the mean over its valid tokens, however it is split; a broken one changes nothing."""

import math

import pytest
import torch

from core.config.errors import UserError
from core.data.packing import IGNORE, Batch
from core.nn.attention import Where
from core.nn.decoder import Decoder
from core.optim.optimizer import Optimizer
from core.testing.toy import Toy, on_cpu
from core.train.loss import cross_entropy
from core.train.step import Objective, train_step, valid_tokens

CPU = torch.device("cpu")


def build() -> Decoder:
    return on_cpu(Toy.Config(vocab_size=50))


def objective(model, *, mask="causal", dtype=torch.float32) -> Objective:
    return Objective(model, cross_entropy, device=CPU, dtype=dtype, mask=mask)


def rows(n: int, *, length: int = 12, seed: int = 0) -> Batch:
    """Random rows of two documents with a fifth of the labels left out, and one row without any label."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(50, (n, length), generator=random)
    labels = torch.randint(50, (n, length), generator=random)
    labels[torch.rand(n, length, generator=random) < 0.2] = IGNORE
    labels[1:2] = IGNORE
    documents = (torch.arange(length) >= 5).long().expand(n, -1)
    positions = torch.cat((torch.arange(5), torch.arange(length - 5))).expand(n, -1)
    return Batch(tokens, labels, positions, documents)


def split(batch: Batch, sizes: list[int]) -> list[Batch]:
    return [Batch(*parts) for parts in zip(*(t.split(sizes) for t in batch), strict=True)]


def step(model, batches, *, mask="causal", max_norm=math.inf, lr=0.0, on_nonfinite="stop"):
    optimizer = Optimizer.Config(weight_decay=0.0).build(weights=model.named_parameters())
    return train_step(
        objective(model, mask=mask), optimizer, batches, step=7, lr=lr, max_norm=max_norm, on_nonfinite=on_nonfinite
    )


@pytest.mark.parametrize("sizes", [[6], [3, 3], [1, 1, 4], [1] * 6], ids=str)
@pytest.mark.parametrize("mask", ["causal", "document"])
def test_gradient_does_not_depend_on_the_split(sizes, mask):
    batch = rows(6)
    model, oracle = build(), build()
    where = Where(batch.positions_BL, batch.documents_BL) if mask == "document" else None
    logits = oracle(batch.tokens_BL, where).double()
    valid = batch.labels_BL != IGNORE
    mean = -logits.log_softmax(-1)[valid].gather(-1, batch.labels_BL[valid][:, None]).mean()
    mean.backward()
    info = step(model, split(batch, sizes), mask=mask)
    assert info.loss == pytest.approx(mean.item(), rel=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7, msg=name)
    norm = torch.stack([p.grad.norm() for p in oracle.parameters()]).norm()
    assert info.grad_norm == pytest.approx(norm.item(), rel=1e-5)


def test_clipping_bounds_the_joint_norm():
    model = build()
    info = step(model, [rows(6)], max_norm=0.05)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert info.grad_norm > 0.05
    assert norm.item() == pytest.approx(0.05, rel=1e-4)


def test_step_without_a_valid_token_is_refused():
    batch = rows(2)
    batch.labels_BL.fill_(IGNORE)
    assert valid_tokens([batch]) == 0
    with pytest.raises(UserError, match="step 7: none of its 2 microbatches"):
        step(build(), split(batch, [1, 1]))


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_nonfinite_stops_before_the_update(broken):
    model = build()
    spoil(model, broken)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match="step 7: .*stopped before the update"):
        step(model, [rows(4)], lr=0.1)
    assert_unchanged(model, before)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_nonfinite_can_be_left_out(broken):
    model = build()
    spoil(model, broken)
    before = {name: p.clone() for name, p in model.named_parameters()}
    info = step(model, [rows(4)], lr=0.1, on_nonfinite="skip")
    assert not info.updated
    assert not (math.isfinite(info.loss) and math.isfinite(info.grad_norm))
    assert_unchanged(model, before)


def assert_unchanged(model, before) -> None:
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0, equal_nan=True)


def spoil(model, what: str) -> None:
    """Make the loss, or only a gradient, not a number."""
    if what == "loss":
        with torch.no_grad():
            model.norm.weight[3] = math.nan
    else:
        model.norm.weight.register_hook(lambda gradient: gradient * math.inf)


def test_finite_step_updates():
    model = build()
    before = [p.clone() for p in model.parameters()]
    assert step(model, [rows(4)], lr=0.1).updated
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_document_mask_hides_the_other_document():
    model, batch = build(), rows(1)
    changed = Batch(batch.tokens_BL.clone(), *batch[1:])
    changed.tokens_BL[:, :5] = (changed.tokens_BL[:, :5] + 1) % 50
    batch.labels_BL[:], changed.labels_BL[:] = IGNORE, IGNORE
    batch.labels_BL[:, 5:] = changed.labels_BL[:, 5:] = 3
    document, causal = objective(model, mask="document"), objective(model, mask="causal")
    assert document(batch).item() == document(changed).item()
    assert causal(batch).item() != causal(changed).item()


def test_bfloat16_computes_near_float32():
    model, batch = build(), rows(4)
    full, half = objective(model)(batch), objective(model, dtype=torch.bfloat16)(batch)
    assert half.dtype == torch.float32
    assert half.item() != full.item()
    assert half.item() == pytest.approx(full.item(), rel=1e-2)
