"""A cached model against the whole forward, of every kind of model."""

import re
from contextlib import nullcontext

import pytest
import torch
from tiny_models import KINDS, tiny
from torch import Tensor

from core.config.errors import UserError
from core.generate import cache
from core.generate.cache import CachedDecoder, Memory
from core.nn.attention import Attention
from core.nn.decoder import Decoder
from core.nn.flex import Flex
from core.nn.kernel import KeyValues
from core.nn.sdpa import SDPA
from core.runtime.device import n_gpus
from core.runtime.units import size_text
from core.testing.toy import Toy, on_cpu, randomise

kinds = pytest.mark.parametrize("kind", KINDS)


def draw(n_rows: int, length: int, vocab_size: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, (n_rows, length), generator=torch.Generator().manual_seed(seed))


def whole(model: Decoder, tokens_BL: Tensor) -> Tensor:
    """Logits of every position by one forward, large enough for 1e-5 to mean something."""
    logits_BLV = model(tokens_BL)
    assert isinstance(logits_BLV, Tensor) and logits_BLV.std() > 0.1
    return logits_BLV


def hooks(model: Decoder) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def assert_close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@kinds
@pytest.mark.parametrize("first", [1, 2, 9])
@torch.no_grad()
def test_token_by_token_equals_the_whole_forward(kind: str, first: int) -> None:
    model, tokens_BL = tiny(kind), draw(3, 20)
    expected_BLV = whole(model, tokens_BL)
    with CachedDecoder(model, n_pads=[0, 0, 0], capacity=20) as cached:
        assert_close(cached(tokens_BL[:, :first]), expected_BLV[:, first - 1])
        for i in range(first, 20):
            assert_close(cached(tokens_BL[:, i : i + 1]), expected_BLV[:, i])
    assert hooks(model) == 0
    assert torch.equal(whole(model, tokens_BL), expected_BLV)


@kinds
@torch.no_grad()
def test_piece_by_piece_equals_the_whole_forward(kind: str) -> None:
    model, tokens_BL = tiny(kind), draw(2, 20, seed=1)
    expected_BLV, end = whole(model, tokens_BL), 0
    with CachedDecoder(model, n_pads=[0, 0], capacity=25) as cached:
        for piece_BL in tokens_BL.split([3, 1, 5, 7, 4], dim=1):
            end += piece_BL.shape[1]
            assert_close(cached(piece_BL), expected_BLV[:, end - 1])


@kinds
@torch.no_grad()
def test_padded_rows_equal_each_row_alone(kind: str) -> None:
    """Prompts of 1, 9, 4 and 9 tokens and 6 more each; what stands in the padding does not matter."""
    model, longest, more = tiny(kind), 9, 6
    lengths = [1, 9, 4, 9]
    rows = [draw(1, length + more, seed=length + 10 * row) for row, length in enumerate(lengths)]
    n_pads = [longest - length for length in lengths]
    results = []
    for filler in (0, 63):
        tokens_BL = torch.cat(
            [torch.nn.functional.pad(row, (n, 0), value=filler) for row, n in zip(rows, n_pads, strict=True)]
        )
        with CachedDecoder(model, n_pads=n_pads, capacity=longest + more) as cached:
            pieces = tokens_BL.split([longest] + [1] * more, dim=1)
            results.append(torch.stack([cached(piece_BL) for piece_BL in pieces], dim=1))
    for row, (tokens_1L, length) in enumerate(zip(rows, lengths, strict=True)):
        assert_close(results[0][row], whole(model, tokens_1L)[0, length - 1 :])
    assert_close(results[1], results[0])


@torch.no_grad()
def test_without_the_cache_a_step_would_differ() -> None:
    """The oracle of the other tests can tell: history matters, and so do the padding's document and positions."""
    model, tokens_BL = tiny("sinks"), draw(1, 12)
    expected_BV = whole(model, tokens_BL)[:, -1]
    assert (model(tokens_BL[:, -1:])[:, -1] - expected_BV).abs().max() > 1e-2
    padded_BL = torch.nn.functional.pad(tokens_BL, (5, 0))
    assert (model(padded_BL)[:, -1] - expected_BV).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("window", [None, 4])
@torch.no_grad()
def test_flex_attends_to_kept_keys_too(window: int | None) -> None:
    config = Attention.Config(n_heads=4, n_kv_heads=2, head_dim=8, window=window, backend="flex")
    model = on_cpu(Toy.Config(attention=config)).eval()
    randomise(model, seed=0)
    assert isinstance(model.layers["0"].attention.kernel, Flex)
    tokens_BL = draw(2, 10)
    expected_BLV = whole(model, tokens_BL)
    with CachedDecoder(model, n_pads=[0, 3], capacity=13) as cached:
        padded_BL = torch.stack(
            [torch.cat([tokens_BL[0], tokens_BL[1, :3]]), torch.cat([tokens_BL[1, :3], tokens_BL[1]])]
        )
        cached(padded_BL[:, :8])
        for i in range(8, 10):
            assert_close(cached(padded_BL[:, i : i + 1])[0], expected_BLV[0, i])
        for i in range(10, 13):
            assert_close(cached(padded_BL[:, i : i + 1])[1], expected_BLV[1, i - 3])


@kinds
@torch.no_grad()
def test_bfloat16_weights(kind: str) -> None:
    """As on an accelerator. The whole forward rounds otherwise, so the two differ by the rounding of bfloat16."""
    model, tokens_BL = tiny(kind).bfloat16(), draw(2, 12)
    expected_BV = whole(model, tokens_BL)[:, -1]
    with CachedDecoder(model, n_pads=[0, 0], capacity=12) as cached:
        for piece_BL in tokens_BL.split([5] + [1] * 7, dim=1):
            logits_BV = cached(piece_BL)
    assert logits_BV.dtype == torch.bfloat16
    assert_close(logits_BV.float(), expected_BV.float(), atol=0.1)


@pytest.mark.parametrize("kind", ["tied", "latent"])
@torch.no_grad()
def test_in_autocast_it_is_that_of_the_whole_forward(kind: str) -> None:
    model, tokens_BL = tiny(kind), draw(4, 9)
    with torch.autocast("cpu", torch.bfloat16), CachedDecoder(model, n_pads=[0] * 4, capacity=9) as cached:
        for piece_BL in tokens_BL.split([5] + [1] * 4, dim=1):
            logits_BV = cached(piece_BL)
    with torch.autocast("cpu", torch.bfloat16):
        expected_BV = whole(model, tokens_BL)[:, -1]
    assert logits_BV.dtype == expected_BV.dtype
    assert_close(logits_BV.float(), expected_BV.float(), atol=0.1)


@kinds
@torch.no_grad()
def test_a_token_is_attended_to_without_the_forms_of_inference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in autocast and under a compiler; with pads, and beyond the window."""
    monkeypatch.setattr("core.nn.sdpa.inference_forms", lambda x: None)
    model, tokens_BL = tiny(kind), draw(2, 20)
    for pads in ([0, 0], [2, 0]):
        with CachedDecoder(model, n_pads=pads, capacity=20) as cached:
            for piece_BL in tokens_BL.split([9] + [1] * 11, dim=1):
                logits_BV = cached(piece_BL)
        for row, n_pads in enumerate(pads):
            assert_close(logits_BV[row], whole(model, tokens_BL[row : row + 1, n_pads:])[0, -1])


@torch.no_grad()
def test_latent_attention_keeps_the_latent_alone() -> None:
    model = tiny("latent")
    with CachedDecoder(model, n_pads=[0], capacity=30) as cached:
        cached(draw(1, 7))
        memory = next(iter(model.layers["0"].attention.keys._forward_hooks.values()))
        assert [tuple(side.shape) for side in memory.sides] == [(1, 30, 6), (1, 30, 1, 4)]


@torch.no_grad()
def test_a_token_is_attended_to_by_latents_alone() -> None:
    """No key and no value of a head is made of what is kept, which a step would spend most of its time on."""
    model = tiny("latent")
    with CachedDecoder(model, n_pads=[0], capacity=30) as cached:
        cached(draw(1, 7))
        for layer in model.layers.values():
            layer.attention.wkv_b.register_forward_hook(lambda *args: pytest.fail("keys and values are made"))
        cached(draw(1, 1))


@torch.no_grad()
def test_kept_keys_are_not_copied() -> None:
    """A step writes its own keys into a buffer that stays where it is."""
    model = tiny("tied")
    with CachedDecoder(model, n_pads=[0], capacity=12) as cached:
        cached(draw(1, 4))
        memory = next(iter(model.layers["1"].attention.keys._forward_hooks.values()))
        places, before = [side.data_ptr() for side in memory.sides], [side[:, :4].clone() for side in memory.sides]
        for _ in range(8):
            cached(draw(1, 1))
        assert [side.data_ptr() for side in memory.sides] == places
        assert all(torch.equal(side[:, :4], kept) for side, kept in zip(memory.sides, before, strict=True))
        with pytest.raises(AssertionError, match="13 tokens, there is room for 12"):
            cached(draw(1, 1))
    assert hooks(model) == 0


@kinds
@torch.no_grad()
def test_what_is_kept_must_fit_into_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known before the first of it is there, to the byte."""
    model, tokens_BL = tiny(kind), draw(3, 4)
    with CachedDecoder(model, n_pads=[0, 0, 0], capacity=12) as cached:
        cached(tokens_BL)
        found = [hook for each in model.modules() for hook in each._forward_hooks.values() if isinstance(hook, Memory)]
        n_bytes = sum(side.untyped_storage().nbytes() for memory in found for side in memory.sides)
    assert len(found) == model.config.n_layers
    for free, fits in ((n_bytes, True), (n_bytes - 1, False)):
        monkeypatch.setattr(cache, "free_memory", lambda device, free=free: free)
        error = f"kept of 3 x 12 tokens takes {size_text(n_bytes)} in float32, cpu has {size_text(free)} left"
        refused = pytest.raises(UserError, match=re.escape(error))
        with nullcontext() if fits else refused, CachedDecoder(model, n_pads=[0, 0, 0], capacity=12) as cached:
            cached(tokens_BL)


@torch.no_grad()
def test_head_computes_the_last_token_alone() -> None:
    model, widths = tiny("tied"), []
    handle = model.output.register_forward_hook(lambda head, inputs, logits: widths.append(logits.shape[1]))
    with CachedDecoder(model, n_pads=[0], capacity=9) as cached:
        cached(draw(1, 8)), cached(draw(1, 1))
    handle.remove()
    assert widths == [1, 1]


def test_equal_prompts_need_no_mask_in_the_first_forward() -> None:
    cached = CachedDecoder(tiny("tied"), n_pads=[0, 0], capacity=9)
    assert SDPA().mask(cached.positions(8)) is None


def test_positions_count_from_the_text() -> None:
    cached = CachedDecoder(tiny("tied"), n_pads=[2, 0], capacity=9)
    where = cached.positions(4)
    assert where.position_BL.tolist() == [[-2, -1, 0, 1], [0, 1, 2, 3]]
    assert where.document_BL is not None and where.document_BL.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    cached.length = 4
    after = cached.positions(1)
    assert after.position_BL.tolist() == [[2], [4]] and after.grid == (2, 1, 5)
    documents, index, keys, of_keys = (tensor.tolist() for tensor in after[1:5] if tensor is not None)
    assert (documents, index, keys) == ([[0], [0]], [[4]], [[0, 1, 2, 3, 4]])
    assert of_keys == [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_hooks_are_gone_after_an_exception() -> None:
    model = tiny("tied")
    n_keys = sum(isinstance(module, KeyValues) for module in model.modules())
    with pytest.raises(KeyboardInterrupt), CachedDecoder(model, n_pads=[0], capacity=4) as cached:
        assert hooks(model) == n_keys + 1
        raise KeyboardInterrupt
    assert hooks(model) == 0
    with pytest.raises(AssertionError, match="inside `with`"):
        cached(draw(1, 1))


def test_model_must_be_in_evaluation_mode() -> None:
    with pytest.raises(AssertionError, match="training"):
        CachedDecoder(tiny("tied").train(), n_pads=[0], capacity=4)


@pytest.mark.gpu
@pytest.mark.skipif(not n_gpus(), reason="the kernels of GPUs")
@kinds
@torch.no_grad()
def test_token_by_token_equals_the_whole_forward_on_a_gpu(kind: str) -> None:
    model, tokens_BL = tiny(kind).cuda(), draw(2, 20).cuda()
    expected_BLV = whole(model, tokens_BL)
    with CachedDecoder(model, n_pads=[0, 0], capacity=20) as cached:
        assert_close(cached(tokens_BL[:, :9]), expected_BLV[:, 8], atol=1e-4)
        for i in range(9, 20):
            assert_close(cached(tokens_BL[:, i : i + 1]), expected_BLV[:, i], atol=1e-4)
