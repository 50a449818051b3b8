"""The local dispatcher against a loop over experts; combine is the transpose of dispatch."""

import pytest
import torch
from attention_by_loops import numbers
from torch import Tensor

from core.nn.dispatch import Local, count

D = 3
CHOICES = {  # experts, and the choices of each token
    "mixed": (4, [[0, 2], [3, 0], [2, 1], [0, 1], [3, 2]]),
    "empty experts": (7, [[6, 1], [1, 4], [4, 6]]),
    "one token": (5, [[3, 0, 4]]),
    "no tokens": (3, torch.empty(0, 2, dtype=torch.int64).tolist()),
    "all tokens to one": (4, [[2]] * 6),
    "one expert": (1, [[0]] * 4),
    "all experts": (3, [[2, 0, 1], [0, 1, 2], [1, 2, 0], [0, 2, 1]]),
}
every_choice = pytest.mark.parametrize(("n_experts", "choices"), CHOICES.values(), ids=CHOICES.keys())


def tensors(choices: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their choices and the weights of these."""
    n_tokens, top_k = len(choices), len(choices[0]) if choices else 2
    ids_TK = torch.tensor(choices, dtype=torch.int64).view(n_tokens, top_k)
    return numbers(n_tokens, D), ids_TK, numbers(n_tokens, top_k, seed=1)


def rows_by_loops(n_experts: int, choices: list[list[int]]) -> list[tuple[int, int]]:
    """(token, number of its choice) of each row: expert by expert, and for each in the order of tokens."""
    return [
        (token, k)
        for expert in range(n_experts)
        for token, chosen in enumerate(choices)
        for k, found in enumerate(chosen)
        if found == expert
    ]


@pytest.mark.parametrize("inference", [False, True])
@every_choice
def test_rows_are_sorted_by_expert(n_experts: int, choices: list[list[int]], inference: bool) -> None:
    x_TD, ids_TK, weight_TK = tensors(choices)
    with torch.inference_mode(inference):
        rows, expected = Local().dispatch(x_TD, ids_TK, weight_TK, n_experts), rows_by_loops(n_experts, choices)
    assert rows.x_RD.shape == (ids_TK.numel(), D) and rows.counts_G.dtype == torch.int64
    assert rows.counts_G.tolist() == [sum(chosen.count(e) for chosen in choices) for e in range(n_experts)]
    for x_D, weight, (token, k) in zip(rows.x_RD, rows.weight_R, expected, strict=True):
        assert torch.equal(x_D, x_TD[token]) and weight == weight_TK[token, k]


@pytest.mark.parametrize("inference", [False, True])
@every_choice
def test_combine_sums_the_rows_of_each_token(n_experts: int, choices: list[list[int]], inference: bool) -> None:
    x_TD, ids_TK, weight_TK = tensors(choices)
    local = Local()
    y_RD, expected_TD = numbers(ids_TK.numel(), D, seed=2), torch.zeros_like(x_TD)
    for y_D, (token, _) in zip(y_RD, rows_by_loops(n_experts, choices), strict=True):
        expected_TD[token] += y_D
    with torch.inference_mode(inference):
        y_TD = local.combine(y_RD, local.dispatch(x_TD, ids_TK, weight_TK, n_experts).back).clone()
    torch.testing.assert_close(y_TD, expected_TD, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_16_bits_are_the_nearest(dtype: torch.dtype) -> None:
    """Half way between two numbers the even one is taken: rounding away from 0 would make all tokens larger."""
    ids_TK = torch.tensor([[0, 1], [1, 0]] * 32)
    x_TD = numbers(64, 256).to(dtype)
    local = Local()
    back = local.dispatch(x_TD, ids_TK, torch.ones(64, 2), 2).back
    y_RD = numbers(128, 256, seed=2).to(dtype)
    assert torch.equal(local.combine(y_RD, back), local.combine(y_RD.double(), back).to(dtype))


@every_choice
def test_combine_is_the_transpose_of_dispatch(n_experts: int, choices: list[list[int]]) -> None:
    """<dispatch x, y> = <x, combine y> for any x and y."""
    x_TD, ids_TK, weight_TK = tensors(choices)
    local = Local()
    rows = local.dispatch(x_TD, ids_TK, weight_TK, n_experts)
    y_RD = numbers(ids_TK.numel(), D, seed=2)
    torch.testing.assert_close((rows.x_RD * y_RD).sum(), (x_TD * local.combine(y_RD, rows.back)).sum())


@every_choice
def test_backward_equals_that_of_plain_indexing(n_experts: int, choices: list[list[int]]) -> None:
    x_TD, ids_TK, weight_TK = tensors(choices)
    expected = rows_by_loops(n_experts, choices)
    token_R = torch.tensor([token for token, _ in expected], dtype=torch.int64)
    choice_R = torch.tensor([k for _, k in expected], dtype=torch.int64)
    grad_TD, results = numbers(len(choices), D, seed=3), []
    for plain in (False, True):
        x, weight = x_TD.clone().requires_grad_(), weight_TK.clone().requires_grad_()
        if plain:
            y = x[token_R].sin() * weight[token_R, choice_R, None]
            out = torch.zeros_like(x).index_add(0, token_R, y)
        else:
            rows = Local().dispatch(x, ids_TK, weight, n_experts)
            out = Local().combine(rows.x_RD.sin() * rows.weight_R[:, None], rows.back)
        (out * grad_TD).sum().backward()
        results.append((out.detach(), x.grad, weight.grad))
    torch.testing.assert_close(*results, rtol=0, atol=1e-14)


def test_gradients_by_differences() -> None:
    n_experts, choices = CHOICES["mixed"]
    x_TD, ids_TK, weight_TK = tensors(choices)

    def there_and_back(x: Tensor, weight: Tensor) -> Tensor:
        rows = Local().dispatch(x, ids_TK, weight, n_experts)
        return Local().combine(rows.x_RD.square() * rows.weight_R[:, None], rows.back)

    assert torch.autograd.gradcheck(there_and_back, (x_TD.requires_grad_(), weight_TK.requires_grad_()))


def test_types_are_those_of_the_rows() -> None:
    x_TD, ids_TK, weight_TK = tensors(CHOICES["mixed"][1])
    rows = Local().dispatch(x_TD.bfloat16(), ids_TK, weight_TK.float(), 4)
    assert (rows.x_RD.dtype, rows.weight_R.dtype) == (torch.bfloat16, torch.float32)
    assert Local().combine(rows.x_RD, rows.back).dtype == torch.bfloat16
    assert Local().combine(rows.x_RD.float(), rows.back).dtype == torch.float32


@pytest.mark.parametrize("shape", [(7,), (2, 3, 4), (0,)])
def test_count(shape: tuple[int, ...]) -> None:
    ids = torch.randint(5, shape, generator=torch.Generator().manual_seed(0))
    assert count(ids, 6).tolist() == [int((ids == number).sum()) for number in range(6)]
