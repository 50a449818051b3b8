"""The meter against sums done by hand, and against a plain count of what autograd saves."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from core.activation_checkpoint.meter import Meter
from core.testing.activation_checkpoint import checkpoint_blocks
from core.testing.toy import Toy, on_cpu

MATRIX = 8 * 8 * 4
"""Bytes of a matrix of eight by eight."""


def test_counts_what_lives_and_forgets_what_died():
    x = torch.ones(8, 8)
    with Meter() as meter:
        a = x + 1
        assert meter.alive == MATRIX
        b = a * 2
        view, half = b.view(-1), b[:4]
        assert meter.alive == 2 * MATRIX, "views share a storage"
        a += 1
        x.add_(1)
        assert meter.alive == 2 * MATRIX, "in place makes nothing, and x was there before"
        del a
        assert meter.alive == MATRIX
        del b
        assert meter.alive == MATRIX, "its views hold it"
        del view
    del half
    assert meter.alive == 0


def test_counts_bytes_not_numbers():
    with Meter() as meter:
        kept = torch.zeros(10, dtype=torch.bfloat16), torch.zeros(10, dtype=torch.float64), torch.zeros(10).bool()
    assert meter.alive == 20 + 80 + 10 and len(kept) == 3


def test_counts_what_backward_needs_and_drops_it_after():
    x, w = torch.ones(8, 8, requires_grad=True), torch.ones(8, 8, requires_grad=True)
    with Meter() as meter:
        y = (x @ w).exp().sin().sum()
    assert meter.alive == MATRIX + 4, "exp saves its result, which is what sin saves; and the sum"
    y.backward()
    assert meter.alive == 4


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_sees_into_a_checkpointed_block(fake):
    def block(x, w):
        return (x @ w).exp().exp().sin()

    with FakeTensorMode(allow_non_fake_inputs=False) if fake else torch.enable_grad():
        x, w = torch.ones(8, 8, requires_grad=True), torch.ones(8, 8, requires_grad=True)
        with Meter() as plain:
            y = block(x, w)
        with Meter() as repeated:
            z = checkpoint(block, x, w, use_reentrant=False)
    assert plain.alive == 3 * MATRIX, "both exponentials and the result"
    assert repeated.alive == MATRIX
    assert y.shape == z.shape


def test_of_a_model_equals_a_plain_count():
    model = on_cpu(Toy.Config())
    checkpoint_blocks(model, "none")
    tokens_BL = torch.arange(48).view(2, 24)
    before = {weight.untyped_storage().data_ptr() for weight in [tokens_BL, *model.parameters()]}
    bytes_of = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        bytes_of[storage.data_ptr()] = storage.nbytes()
        return tensor

    with Meter() as meter:
        logits = model(tokens_BL)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        again = model(tokens_BL)
        note(again)
    assert meter.alive == sum(size for place, size in bytes_of.items() if place not in before)
    assert logits.shape == again.shape


@pytest.mark.parametrize("plain", [True, False])
def test_saved_bytes_fall_from_mode_to_mode(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms of a CPU keep less where nothing is computed again, and the same where it is."""
    for room in ("layers", "rope", "feed_forward") if plain else ():
        monkeypatch.setattr(f"core.nn.{room}.cpu_forms", lambda x: None)
    tokens_BL = torch.arange(48).view(2, 24)
    alive = {}
    for mode in ("none", "selective", "full"):
        model = on_cpu(Toy.Config(n_layers=3))
        checkpoint_blocks(model, mode)
        with Meter() as meter:
            logits = model(tokens_BL)
        alive[mode] = meter.alive
        logits.sum().backward()
    factor = 2 if plain else 1.5
    assert alive["none"] > factor * alive["selective"] > factor * 2 * alive["full"] > 0
    d, heads, kv, hidden, n = 16, 4 * 8, 2 * 8, 24, 48
    selective = 3 * 4 * n * (heads + kv + heads + hidden + d)  # wq wv attention w1 w2, in fp32
    sums = 3 * 4 * n * 4  # attention's logarithms of sums, one per head
    assert alive["selective"] - alive["full"] == selective + sums
