"""The loop against one whole forward per token."""

from collections.abc import Sequence

import pytest
import torch
from tiny_models import KINDS, tiny
from torch import Tensor

from core.generate.generate import Completion, generate
from core.generate.sample import Sampler
from core.nn.decoder import Decoder

PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3, 2]]
kinds = pytest.mark.parametrize("kind", KINDS)


@torch.no_grad()
def one_by_one(model: Decoder, prompt: Sequence[int], sampler: Sampler, limit: int, n_tokens: int = 64) -> list[int]:
    """`limit` tokens behind a prompt, each from a forward over all before it."""
    ids = list(prompt)
    for _ in range(limit):
        logits_1LV = model(torch.tensor([ids]))
        assert isinstance(logits_1LV, Tensor)
        ids += sampler(logits_1LV[:, -1, :n_tokens]).tolist()
    return ids[len(prompt) :]


def continued(model: Decoder, sampler: Sampler, limits: Sequence[int], **settings) -> list[Completion]:
    return generate(model, PROMPTS, sampler, limits=limits, **{"n_tokens": 64, **settings})


@kinds
def test_greedy_is_the_argmax_of_whole_forwards(kind: str) -> None:
    model = tiny(kind)
    found = continued(model, Sampler(3, temperature=0.0), [12, 12, 12])
    expected = [one_by_one(model, prompt, Sampler(1, temperature=0.0), 12) for prompt in PROMPTS]
    assert [completion.ids for completion in found] == expected
    assert not any(completion.ended for completion in found)


@kinds
def test_draws_are_those_of_whole_forwards(kind: str) -> None:
    model, settings = tiny(kind), {"temperature": 1.3, "top_k": 30, "top_p": 0.95}
    found = continued(model, Sampler(3, seed=4, **settings), [12, 12, 12])
    expected = [one_by_one(model, p, Sampler(1, seed=4 + row, **settings), 12) for row, p in enumerate(PROMPTS)]
    assert [completion.ids for completion in found] == expected
    assert len({token for ids in expected for token in ids}) > 12


def test_each_prompt_has_its_own_limit() -> None:
    model, limits = tiny("tied"), [2, 9, 1]
    found = continued(model, Sampler(3, temperature=0.0), limits)
    for completion, prompt, limit in zip(found, PROMPTS, limits, strict=True):
        assert completion.ids == one_by_one(model, prompt, Sampler(1, temperature=0.0), limit)


def test_eos_ends_a_row_and_is_not_part_of_it() -> None:
    model, prompt = tiny("tied"), PROMPTS[0]
    free = one_by_one(model, prompt, Sampler(1, seed=1), 20)
    eos = next(token for i, token in enumerate(free) if i >= 5 and token not in free[:i])
    [found] = generate(model, [prompt], Sampler(1, seed=1), limits=[20], n_tokens=64, end_ids=[eos])
    assert found == Completion(free[: free.index(eos)], ended=True)
    [other] = generate(model, [prompt], Sampler(1, seed=1), limits=[free.index(eos)], n_tokens=64, end_ids=[eos])
    assert other == Completion(free[: free.index(eos)], ended=False)


def test_rows_that_ended_do_not_change_the_others() -> None:
    model = tiny("sinks, and a window in every second block")
    free = [one_by_one(model, prompt, Sampler(1, seed=row), 15) for row, prompt in enumerate(PROMPTS)]
    eos = free[0][3]
    found = continued(model, Sampler(3), [15, 15, 15], end_ids=[eos])
    for completion, ids in zip(found, free, strict=True):
        assert completion == Completion(ids[: ids.index(eos)] if eos in ids else ids, ended=eos in ids)


def test_no_token_that_the_tokenizer_lacks() -> None:
    """A model may have more rows than its tokenizer has tokens; here the others are the likeliest."""
    model = tiny("normalised heads")
    with torch.no_grad():
        model.output.weight[40:] *= 5
    assert max(one_by_one(model, PROMPTS[0], Sampler(1), 20)) >= 40
    for temperature in (0.0, 1.0):
        found = continued(model, Sampler(3, temperature=temperature), [20, 20, 20], n_tokens=40)
        assert max(token for completion in found for token in completion.ids) < 40
        alone = one_by_one(model, PROMPTS[0], Sampler(1, temperature=temperature), 20, n_tokens=40)
        assert found[0].ids == alone


def test_tokens_are_told_as_they_come() -> None:
    events: list[tuple[int, int | None]] = []
    found = continued(tiny("tied"), Sampler(3), [2, 3, 1], emit=lambda row, token: events.append((row, token)))
    assert [row for row, _ in events] == [0, 1, 2, 2, 0, 0, 1, 1, 1]
    assert [row for row, token in events if token is None] == [2, 0, 1]
    for row, completion in enumerate(found):
        assert [token for other, token in events if other == row and token is not None] == completion.ids


def test_nothing_is_left_in_the_model_when_the_listener_fails() -> None:
    model = tiny("latent")

    def fail(row: int, token: int | None) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        continued(model, Sampler(3), [5, 5, 5], emit=fail)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_generation_keeps_the_counts_of_training_alone() -> None:
    model = tiny("experts")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    continued(model, Sampler(3), [5, 5, 5])
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
