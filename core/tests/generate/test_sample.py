"""The choice of a token against loops over sorted lists."""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from core.config.errors import UserError
from core.generate.sample import Sampler, choices, places


def distribution(logits: Sequence[float], temperature: float, top_k: int | None, top_p: float) -> dict[int, float]:
    """Probability of each token that may be chosen: one token after another, likeliest first."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:top_k]
    weights = {token: math.exp((logits[token] - max(logits)) / temperature) for token in ranked}
    total = sum(map(Fraction, weights.values()))
    chosen: dict[int, float] = {}
    for token, weight in weights.items():
        if sum(map(Fraction, chosen.values())) < Fraction(top_p) * total:
            chosen[token] = weight
    return {token: weight / sum(chosen.values()) for token, weight in chosen.items()}


def drawn_logits(n_rows: int, n_tokens: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(n_rows, n_tokens, generator=torch.Generator().manual_seed(seed))


def as_dicts(probability_BV: Tensor, ids_BV: Tensor) -> list[dict[int, float]]:
    rows = zip(ids_BV.tolist(), probability_BV.tolist(), strict=True)
    return [{token: share for token, share in zip(ids, shares, strict=True) if share > 0} for ids, shares in rows]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 3, 40, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-9])
def test_choices_equal_a_loop(temperature: float, top_k: int | None, top_p: float) -> None:
    logits_BV = drawn_logits(5, 40)
    found = as_dicts(*choices(logits_BV, temperature, top_k, top_p))
    for row, logits_V in zip(found, logits_BV.tolist(), strict=True):
        expected = distribution(logits_V, temperature, top_k, top_p)
        everything = top_k is None and top_p == 1.0
        assert list(row) == (sorted(expected) if everything else list(expected))
        assert row == pytest.approx(expected, rel=1e-9)


def test_top_p_keeps_the_token_that_reaches_it_and_no_more() -> None:
    logits_BV = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    for top_p, kept in ((0.4, [0]), (0.51, [0, 1]), (0.74, [0, 1]), (0.76, [0, 1, 2]), (0.88, [0, 1, 2, 3])):
        assert [list(row) for row in as_dicts(*choices(logits_BV, 1.0, None, top_p))] == [kept]


def test_top_p_that_is_reached_exactly() -> None:
    assert [list(row) for row in as_dicts(*choices(torch.zeros(1, 4), 1.0, None, 0.5))] == [[0, 1]]


def test_top_p_looks_at_shares_among_the_top_k() -> None:
    logits_BV = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    assert list(as_dicts(*choices(logits_BV, 1.0, None, 0.5))[0]) == [0, 1]
    assert list(as_dicts(*choices(logits_BV, 1.0, 2, 0.5))[0]) == [0]  # 0.4 of 0.7 are above a half


def test_of_equal_tokens_the_lower_ids_stay() -> None:
    logits_BV = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, 2.0]])
    assert as_dicts(*choices(logits_BV, 1.0, 3, 1.0)) == [pytest.approx(distribution([0, 2, 1, 1, 1, 2], 1.0, 3, 1.0))]
    assert list(as_dicts(*choices(logits_BV, 1.0, 3, 1.0))[0]) == [1, 5, 2]


def test_without_limits_the_least_likely_token_stays() -> None:
    row = as_dicts(*choices(torch.tensor([[0.0, -80.0, -600.0]]), 1.0, None, 1.0))[0]
    assert row == pytest.approx({0: 1.0, 1: math.exp(-80), 2: math.exp(-600)})


def test_tiny_temperature_is_nearly_greedy() -> None:
    assert as_dicts(*choices(torch.tensor([[90.0, 89.0, -90.0]]), 1e-300, None, 1.0)) == [{0: 1.0}]


def test_places_are_those_of_the_summed_probabilities() -> None:
    probability_BV = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64)
    below_1 = math.nextafter(1.0, 0.0)
    for number, place in ((0.0, 0), (0.49, 0), (0.5, 1), (0.74, 1), (0.75, 2), (0.99, 2), (below_1, 2)):
        assert places(probability_BV, torch.tensor([number], dtype=torch.float64)).tolist() == [[place]]


def test_no_number_falls_on_a_token_that_was_left_out() -> None:
    """Rounding of the sums must not push the highest number behind the last token that stays, not even as 1.0."""
    for seed in range(100):
        probability_BV, _ = choices(drawn_logits(1, 50, seed), 1.0, 30, 0.9)
        for number in (math.nextafter(1.0, 0.0), 1.0):
            place = int(places(probability_BV, torch.tensor([number], dtype=torch.float64)))
            assert place == int((probability_BV > 0).sum()) - 1 < 49


def test_draws_have_the_probabilities() -> None:
    """A grid of numbers in place of random ones: each token gets its share to within one cell."""
    logits_BV, n = drawn_logits(1, 12), 10_000
    probability_BV, ids_BV = choices(logits_BV, 1.0, 8, 0.95)
    numbers = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = ids_BV.expand(n, -1).gather(-1, places(probability_BV.expand(n, -1).contiguous(), numbers)).flatten()
    expected = distribution(logits_BV[0].tolist(), 1.0, 8, 0.95)
    for token in range(12):
        assert float((drawn == token).sum()) / n == pytest.approx(expected.get(token, 0.0), abs=1.01 / n)


def test_a_draw_is_the_next_number_of_the_rows_own_stream() -> None:
    logits_BV = drawn_logits(3, 20)
    sampler = Sampler(3, temperature=0.8, top_k=10, seed=7)
    streams = [torch.Generator().manual_seed(7 + row) for row in range(3)]
    for _ in range(20):
        expected = []
        for logits_V, stream in zip(logits_BV.tolist(), streams, strict=True):
            number, shares = torch.rand((), generator=stream, dtype=torch.float64), distribution(logits_V, 0.8, 10, 1.0)
            ends = zip(shares, accumulate(shares.values()), strict=True)
            expected.append(next(token for token, end in ends if number < end))
        assert sampler(logits_BV).tolist() == expected


def test_a_row_does_not_depend_on_the_others() -> None:
    logits_BV = drawn_logits(4, 30)
    batch, alone = Sampler(4, seed=3), Sampler(1, seed=5)
    for _ in range(10):
        assert batch(logits_BV)[2] == alone(logits_BV[2:3])[0]


def test_same_seed_same_tokens_another_seed_others() -> None:
    logits_BV = drawn_logits(1, 50) / 3

    def ten(seed: int) -> list[int]:
        sampler = Sampler(1, seed=seed)
        return [int(sampler(logits_BV)) for _ in range(10)]

    assert ten(1) == ten(1) != ten(2)
    assert len(ten(2**63 - 1)) == 10


def test_temperature_0_takes_the_likeliest_and_draws_nothing() -> None:
    sampler = Sampler(2, temperature=0.0, top_k=3, top_p=0.5)
    assert sampler(torch.tensor([[0.0, 3.0, 3.0], [1.0, -1.0, 0.0]])).tolist() == [1, 0]
    before = torch.Generator().manual_seed(0).get_state()
    assert torch.equal(sampler.generators[0].get_state(), before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(value: float, temperature: float) -> None:
    with pytest.raises(UserError, match="logits that are not finite: the weights of this checkpoint are broken"):
        Sampler(1, temperature=temperature)(torch.tensor([[0.0, value]]))


def test_bfloat16_logits_are_chosen_from_in_full_precision() -> None:
    logits_BV = drawn_logits(1, 20).bfloat16()
    found = as_dicts(*choices(logits_BV, 0.7, 5, 0.9))
    assert found == [pytest.approx(distribution(logits_BV[0].tolist(), 0.7, 5, 0.9), rel=1e-9)]
