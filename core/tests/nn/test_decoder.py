"""The decoder's wiring: residuals, tied weights, masks made once, and its limits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.attention import SDPA, Mask, Where
from core.nn.decoder import Block, Decoder
from core.nn.layers import RMSNorm
from core.nn.rope import RoPE
from core.testing.toy import Toy, on_cpu, on_meta, randomise


def tokens(n_rows: int, length: int) -> Tensor:
    return torch.randint(64, (n_rows, length), generator=torch.Generator().manual_seed(0))


def toy(**changes: Any) -> Decoder:
    model = on_cpu(Toy.Config(**changes))
    randomise(model, seed=0)
    return model


class Times(nn.Module):
    """Stands for attention or feed-forward: the input times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x * self.factor


def test_a_block_adds_to_the_residual_stream() -> None:
    block = Block(4, norm_eps=1e-6, attention=Times(2.0), feed_forward=Times(3.0))
    torch.nn.init.constant_(block.attention_norm.weight, 10.0)
    torch.nn.init.constant_(block.ffn_norm.weight, 100.0)
    x = torch.tensor([[[1.0, -1.0, 1.0, 1.0]]])  # with a mean square of 1
    middle = x + 2 * 10 * x
    torch.testing.assert_close(block(x, None, None), middle + 3 * 100 * middle / 21)


def test_embed_blocks_norm_head() -> None:
    model = toy(n_layers=3)
    for i, block in enumerate(model.layers.values()):
        block.forward = lambda x_BLD, rotation, mask, i=i: x_BLD * (i + 2.0) + i
    tokens_BL = tokens(2, 5)
    x_BLD = ((model.tok_embeddings.weight[tokens_BL] * 2.0) * 3.0 + 1.0) * 4.0 + 2.0
    norm = RMSNorm(16, eps=1e-6)
    norm.weight = model.norm.weight
    torch.testing.assert_close(model(tokens_BL), norm(x_BLD) @ model.output.weight.T)


@torch.no_grad()
def test_no_token_sees_a_later_one() -> None:
    model, before_BL = toy(), tokens(2, 20)
    after_BL = before_BL.clone()
    after_BL[:, 12:] = (after_BL[:, 12:] + 1) % 64
    before, after = model(before_BL), model(after_BL)
    torch.testing.assert_close(after[:, :12], before[:, :12], rtol=0, atol=1e-6)
    assert (after[:, 12:] - before[:, 12:]).abs().amax(-1).min() > 1e-3


def test_too_many_positions_are_an_error() -> None:
    model = toy(max_seq_len=8)
    assert model(tokens(1, 8)).shape == (1, 8, 64)
    message = "9 positions asked for, the model has max_seq_len 8: shorten the rows or raise model.max_seq_len"
    with pytest.raises(UserError, match=message):
        model(tokens(1, 9))


@pytest.mark.parametrize("scaling", ["none", "llama", "yarn"])
@torch.no_grad()
def test_logits_do_not_depend_on_max_seq_len(scaling: str) -> None:
    """Frequencies are a matter of the configuration, not of how long a row this run may have."""
    rope = RoPE.Config(theta=100.0, scaling=scaling, scaling_factor=4.0, original_seq_len=16)
    short, long = (toy(max_seq_len=length, rope=rope) for length in (12, 4096))
    assert torch.equal(short(tokens(2, 12)), long(tokens(2, 12)))


def test_a_tied_head_adds_both_gradients() -> None:
    tied, untied = toy(tie_embeddings=True), toy(tie_embeddings=False)
    with torch.no_grad():
        for name, weight in untied.named_parameters():
            weight.copy_(tied.state_dict()[name])
    for model in (tied, untied):
        model(tokens(2, 10)).logsumexp(-1).sum().backward()
    assert tied.output.weight is tied.tok_embeddings.weight
    both = untied.output.weight.grad + untied.tok_embeddings.weight.grad
    torch.testing.assert_close(tied.output.weight.grad, both, rtol=1e-5, atol=1e-5)


class Counting(SDPA):
    """Counts how often a mask is made."""

    made = 0

    def mask(self, where: Where) -> Mask:
        self.made += 1
        return super().mask(where)


def test_a_mask_is_made_once_for_all_blocks() -> None:
    model, kernel = toy(n_layers=4), Counting()
    for block in model.layers.values():
        block.attention.kernel = kernel
    model(tokens(1, 6))
    assert kernel.made == 1


def test_building_on_meta_takes_no_memory() -> None:
    model = on_meta(Toy.Config(dim=65_536, vocab_size=1_000_000))
    assert all(weight.is_meta for weight in model.parameters())
    assert not model.rope.inverse_frequency.is_meta


def test_state_dict_holds_weights_alone() -> None:
    model = on_meta(Toy.Config())
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("field", ["dim", "n_layers", "vocab_size", "max_seq_len"])
def test_sizes_must_be_positive(field: str) -> None:
    with pytest.raises(UserError, match=f"{field}: {field} 0 must be at least 1"):
        validate(Toy.Config(**{field: 0}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_eps": -1e-6}, "norm_eps: norm_eps -1e-06 must not be negative"),
        ({"norm_eps": float("nan")}, "norm_eps: norm_eps nan"),
        ({"init_std": 0.0}, "init_std: init_std 0.0 must be above 0"),
        ({"init_std": float("nan")}, "init_std: init_std nan"),
    ],
)
def test_numbers_that_make_no_sense(change: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(Toy.Config(**change))
