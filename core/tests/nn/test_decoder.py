"""The decoder's wiring: residuals, tied weights, masks made once, and its limits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.decoder import Block, Decoder
from core.nn.feed_forward import FeedForward
from core.nn.kernel import Mask, Positions
from core.nn.layers import RMSNorm
from core.nn.moe import MoE
from core.nn.mtp import Predictions
from core.nn.rope import RoPE
from core.nn.sdpa import SDPA
from core.nn.weights import training_flops_per_token
from core.runtime.meta import meta_model
from core.testing.toy import Toy, ToyMoE, on_cpu, randomise


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

    def mask(self, positions: Positions) -> Mask:
        self.made += 1
        return super().mask(positions)


def test_a_mask_is_made_once_for_all_blocks() -> None:
    model, kernel = toy(n_layers=4), Counting()
    for block in model.layers.values():
        block.attention.kernel = kernel
    model(tokens(1, 6))
    assert kernel.made == 1


def test_blocks_with_windows_of_their_own_share_masks() -> None:
    model = toy(n_layers=5)
    made: list[int | None] = []

    class Noting(SDPA):
        def mask(self, positions: Positions) -> Mask:
            made.append(self.window)
            return super().mask(positions)

    for i, block in enumerate(model.layers.values()):
        block.attention.kernel = Noting(3 if i % 2 else None)
    model(tokens(1, 6))
    assert made == [None, 3]


def test_a_block_has_one_network() -> None:
    with pytest.raises(AssertionError, match="a block has one network"):
        Block(4, norm_eps=1e-6, attention=Times(2.0))
    with pytest.raises(AssertionError, match="a block has one network"):
        Block(4, norm_eps=1e-6, attention=Times(2.0), feed_forward=Times(1.0), moe=Times(1.0))
    block = Block(4, norm_eps=1e-6, attention=Times(0.0), moe=Times(3.0))
    torch.nn.init.ones_(block.attention_norm.weight)
    torch.nn.init.ones_(block.ffn_norm.weight)
    x = torch.tensor([[[1.0, -1.0, 1.0, 1.0]]])
    torch.testing.assert_close(block(x, None, None), x + 3 * x)


def test_a_mixture_of_experts_stands_where_the_model_says() -> None:
    model = on_cpu(ToyMoE.Config(n_layers=3))
    assert [type(block.moe) for block in model.layers.values()] == [type(None), MoE, MoE]
    assert [type(block.feed_forward) for block in model.layers.values()] == [FeedForward, type(None), type(None)]
    buffers = {f"layers.{i}.moe.router.selection_bias" for i in (1, 2)}
    assert model.state_dict().keys() == dict(model.named_parameters()).keys() | buffers


def ahead_by_hand(model: Decoder, tokens_BL: Tensor) -> list[Tensor]:
    """Logits of the tokens after the next (arXiv:2412.19437, 2.2), each depth from hidden states of the one before."""

    def normed(x: Tensor, norm: RMSNorm) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    positions = Positions.rows(tokens_BL)
    rotation, mask = model.rope(positions.position_BL), SDPA().mask(positions)
    blocks = list(model.layers.values())
    h_BLD = model.tok_embeddings.weight[tokens_BL]
    for block in blocks[: model.config.n_layers]:
        h_BLD = block(h_BLD, rotation, mask)
    h_BLD, found = normed(h_BLD, model.norm), []
    for k, block in enumerate(blocks[model.config.n_layers :], start=1):
        merge = model.ahead[str(model.config.n_layers + k - 1)]
        ids_BL = torch.cat((tokens_BL[:, k:], tokens_BL[:, :k]), dim=1)
        next_BLD = model.tok_embeddings.weight[ids_BL]
        joined = torch.cat((normed(next_BLD, merge.enorm), normed(h_BLD, merge.hnorm)), -1)
        h_BLD = normed(block(joined @ merge.eh_proj.weight.T, rotation, mask), merge.norm)
        found.append(h_BLD @ model.output.weight.T)
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_training_predicts_further_tokens(tied: bool) -> None:
    model, tokens_BL = toy(n_mtp_layers=2, tie_embeddings=tied), tokens(2, 10)
    found = model(tokens_BL)
    assert isinstance(found, Predictions) and len(found.further) == 2
    for logits_BLV, expected in zip(found.further, ahead_by_hand(model, tokens_BL), strict=True):
        torch.testing.assert_close(logits_BLV, expected, rtol=1e-5, atol=1e-5)
    plain = model.eval()(tokens_BL)
    assert isinstance(plain, Tensor) and torch.equal(plain, found.main)


@torch.no_grad()
def test_further_predictions_see_one_token_more_each() -> None:
    """A change of token 7 reaches logits from place 7, then 6, then 5 on; the row's beginning stands in at its end."""
    model, before_BL = toy(n_mtp_layers=2), tokens(1, 12)
    after_BL = before_BL.clone()
    after_BL[:, 7] = (after_BL[:, 7] + 1) % 64
    before, after = model(before_BL), model(after_BL)
    pairs = zip((before.main, *before.further), (after.main, *after.further), strict=True)
    for k, (first, second) in enumerate(pairs):
        moved = (first - second).abs().amax(-1)[0] > 1e-6
        assert moved.tolist() == [place >= 7 - k for place in range(12)]


def test_blocks_behind_the_last_one_cost_a_head_each() -> None:
    plain, ahead = (training_flops_per_token(meta_model(Toy.Config(n_mtp_layers=n)), 8) for n in (0, 2))
    block, merge, head = 16 * (32 + 16 + 16 + 32 + 3 * 24), 2 * 16 * 16, 16 * 64
    assert ahead.matmul - plain.matmul == 2 * 6 * (block + merge + head)
    assert ahead.attention == 2 * plain.attention


def test_building_on_meta_takes_no_memory() -> None:
    model = meta_model(Toy.Config(dim=65_536, vocab_size=1_000_000))
    assert all(weight.is_meta for weight in model.parameters())
    assert not model.rope.inverse_frequency.is_meta


def test_state_dict_holds_weights_alone() -> None:
    model = meta_model(Toy.Config())
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
        ({"n_mtp_layers": -1}, "n_mtp_layers: n_mtp_layers -1 must be at least 0"),
        ({"mtp_loss_weight": 0.0}, "mtp_loss_weight: mtp_loss_weight 0.0 must be above 0; n_mtp_layers 0 is off"),
        ({"mtp_loss_weight": float("nan")}, "mtp_loss_weight: mtp_loss_weight nan"),
    ],
)
def test_numbers_that_make_no_sense(change: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(Toy.Config(**change))
