"""A step's gradient is that of the mean over its valid tokens, however it is split; a broken one changes nothing."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from core.config.errors import UserError
from core.data.packing import IGNORE, Batch
from core.nn.balance import balance_loss, layer_loads, load_metrics, routers
from core.nn.decoder import Decoder
from core.nn.kernel import Positions
from core.nn.mtp import Predictions
from core.nn.weights import weights
from core.optim.adam import AdamW
from core.optim.groups import Group
from core.parallel.layout import SingleRank
from core.step.loss import CrossEntropy
from core.step.objective import Objective, labels_ahead, valid_tokens
from core.step.update import train_step
from core.testing.oracles import cross_entropy
from core.testing.toy import Toy, ToyMoE, on_cpu, randomise

CPU = torch.device("cpu")


def build() -> Decoder:
    return on_cpu(Toy.Config(vocab_size=50))


def objective(model, *, mask="causal", dtype=torch.float32) -> Objective:
    return Objective([model], CrossEntropy.Config().build(), layout=SingleRank(CPU), dtype=dtype, mask=mask)


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
    return [Batch(*parts) for parts in zip(*(t.split(sizes) for t in batch[:4]), strict=True)]


def step(model, batches, *, mask="causal", max_norm=math.inf, lr=0.0, on_nonfinite="stop", groups=(), **more):
    config = AdamW.Config(lr=lr, weight_decay=0.0, groups=list(groups))
    optimizer = config.build(weights=weights(model), layout=SingleRank(CPU))
    settings = {"lr_factor": 1.0, "max_norm": max_norm, "on_nonfinite": on_nonfinite, **more}
    return train_step(objective(model, mask=mask), optimizer, batches, step=7, **settings)


@pytest.mark.parametrize("sizes", [[6], [3, 3], [1, 1, 4], [1] * 6], ids=str)
@pytest.mark.parametrize("mask", ["causal", "document"])
def test_gradient_does_not_depend_on_the_split(sizes, mask):
    batch = rows(6)
    model, oracle = build(), build()
    positions = Positions(batch.positions_BL, batch.documents_BL) if mask == "document" else None
    logits = oracle(batch.tokens_BL, positions).double()
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
    assert document(batch).total == document(changed).total
    assert causal(batch).total != causal(changed).total


def test_bfloat16_computes_near_float32():
    model, batch = build(), rows(4)
    full, half = objective(model)(batch).total, objective(model, dtype=torch.bfloat16)(batch).total
    assert half.dtype == torch.float32
    assert half.item() != full.item()
    assert half.item() == pytest.approx(full.item(), rel=1e-2)


# ------------------------------------------------------------------------------------------------ further predictions


def ahead_by_loops(labels: list[list[int]], documents: list[list[int]] | None, k: int) -> list[list[int]]:
    length = len(labels[0])
    return [
        [
            labels[row][i + k]
            if i + k < length and (documents is None or documents[row][i + k] == documents[row][i])
            else IGNORE
            for i in range(length)
        ]
        for row in range(len(labels))
    ]


@pytest.mark.parametrize("k", [1, 2, 5, 11, 12, 13])
@pytest.mark.parametrize("mask", ["causal", "document"])
def test_labels_further_on_stay_in_row_and_document(k, mask):
    batch = rows(4)
    labels, documents = batch.labels_BL.tolist(), batch.documents_BL.tolist()
    positions = Positions(batch.positions_BL, batch.documents_BL if mask == "document" else None)
    expected = ahead_by_loops(labels, documents if mask == "document" else None, k)
    assert labels_ahead(batch.labels_BL, k, positions).tolist() == expected
    assert batch.labels_BL.tolist() == labels, "the labels of the next token are read again"
    assert k > 1 or any(label != IGNORE for row in expected for label in row)


@pytest.mark.parametrize("mask", ["causal", "document"])
@pytest.mark.parametrize("n_ahead", [1, 2])
def test_loss_of_further_predictions_equals_loops(mask, n_ahead):
    """Summed over their labels, averaged over depths, weighted; what is reported is the next token alone."""
    model = on_cpu(Toy.Config(vocab_size=50, n_mtp_layers=n_ahead, mtp_loss_weight=0.7))
    randomise(model, seed=1)
    batch = rows(4)
    documents = batch.documents_BL if mask == "document" else None
    found = objective(model, mask=mask)(batch)
    logits = model(batch.tokens_BL, Positions(batch.positions_BL, documents) if mask == "document" else None)
    assert isinstance(logits, Predictions)

    def nats(logits_BLV: Tensor, labels: list[list[int]]) -> float:
        logs = logits_BLV.double().log_softmax(-1)
        return -sum(logs[b, i, v].item() for b, row in enumerate(labels) for i, v in enumerate(row) if v != IGNORE)

    main = nats(logits.main, batch.labels_BL.tolist())
    further = [
        nats(one, ahead_by_loops(batch.labels_BL.tolist(), None if documents is None else documents.tolist(), k))
        for k, one in enumerate(logits.further, start=1)
    ]
    assert found.main.item() == pytest.approx(main, rel=1e-6) and all(further)
    assert found.total.item() == pytest.approx(main + 0.7 * sum(further) / n_ahead, rel=1e-6)
    assert step(model, [batch], mask=mask).loss == pytest.approx(main / valid_tokens([batch]), rel=1e-6)
    model.eval()
    plain = objective(model, mask=mask)(batch)
    assert plain.total is plain.main and plain.main.item() == pytest.approx(main, rel=1e-6)


@pytest.mark.parametrize("sizes", [[3, 3], [1] * 6], ids=str)
def test_gradient_of_further_predictions_does_not_depend_on_the_split(sizes):
    batch, found = rows(6), []
    for parts in ([6], sizes):
        model = on_cpu(Toy.Config(vocab_size=50, n_mtp_layers=1))
        info = step(model, split(batch, parts))
        found.append((info.grad_norm, {name: p.grad for name, p in model.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        assert gradient.any(), name
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


# ------------------------------------------------------------------------------------------------ balance of experts


def build_moe(**router: Any) -> ToyMoE:
    config = ToyMoE.Config(vocab_size=50, n_layers=3)
    for name, value in router.items():
        setattr(config.moe.router, name, value)
    model = on_cpu(config)
    randomise(model, seed=1)
    assert isinstance(model, ToyMoE)
    return model


def choices(model: ToyMoE, batch: Batch) -> dict[str, list[int]]:
    """How often each expert is chosen for a batch, counted by hand, without training."""
    found: dict[str, list[int]] = {}
    handles = [
        router.register_forward_hook(
            lambda module, given, out, name=name: found.update(
                {name: [out.ids_TK.flatten().tolist().count(e) for e in range(6)]}
            )
        )
        for name, router in routers(model).items()
    ]
    with torch.no_grad():
        model.eval()(batch.tokens_BL)
    model.train()
    for handle in handles:
        handle.remove()
    return found


def moved(load: list[int], coeff: float) -> list[float]:
    """One step of the bias by hand: whole steps towards the mean load, less their mean."""
    mean = sum(load) / len(load)
    signs = [(n < mean) - (n > mean) for n in load]
    return [coeff * (sign - sum(signs) / len(signs)) for sign in signs]


@pytest.mark.parametrize("sizes", [[6], [3, 3], [1, 1, 4], [1] * 6], ids=str)
def test_bias_moves_once_a_step_by_the_load_of_the_whole_step(sizes):
    model, batch = build_moe(load_balance_coeff=0.01), rows(6)
    loads = choices(model, batch)
    step(model, split(batch, sizes))
    for name, router in routers(model).items():
        assert router.tokens_E.tolist() == loads[name]
        assert router.selection_bias.tolist() == pytest.approx(moved(loads[name], 0.01), abs=1e-8)
        assert router.selection_bias.any()
    loads, before = choices(model, batch), {name: r.selection_bias.tolist() for name, r in routers(model).items()}
    step(model, split(batch, sizes))  # counts of the first step are gone
    for name, router in routers(model).items():
        moves = zip(before[name], moved(loads[name], 0.01), strict=True)
        assert router.selection_bias.tolist() == pytest.approx([start + move for start, move in moves], abs=1e-8)


def test_the_update_sees_the_bias_that_chose():
    """The bias moves after the update: forward and backward of a step know one bias."""
    model, batch, seen = build_moe(load_balance_coeff=0.01), rows(6), []
    for router in routers(model).values():
        router.register_forward_pre_hook(lambda module, given: seen.append(module.selection_bias.clone()))
    step(model, split(batch, [3, 3]))
    assert len(seen) == 4 and not any(bias.any() for bias in seen)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_left_out_moves_no_bias(broken):
    model = build_moe(load_balance_coeff=0.01)
    spoil(model, broken)
    assert not step(model, [rows(4)], on_nonfinite="skip").updated
    assert all(router.tokens_E.any() for router in routers(model).values())
    assert not any(router.selection_bias.any() for router in routers(model).values())
    with pytest.raises(UserError, match="stopped before the update"):
        step(model, [rows(4)])
    assert not any(router.selection_bias.any() for router in routers(model).values())


def test_evaluation_between_steps_moves_and_counts_nothing():
    found = []
    for evaluates in (False, True):
        model, batch = build_moe(load_balance_coeff=0.01, balance_loss_coeff=0.1), rows(6)
        for _ in range(3):
            step(model, [batch], lr=1e-2)
            if evaluates:
                before = load_metrics(layer_loads(model), balance_loss(model))
                with torch.no_grad():
                    objective(model.eval())(rows(6, seed=5))
                model.train()
                assert load_metrics(layer_loads(model), balance_loss(model)) == before
        found.append(model.state_dict())
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


def explicit_total(model: ToyMoE, batch: Batch, coeff: float, mask: str) -> tuple[Tensor, Tensor]:
    """Cross entropy, and the balance losses of all routers, both summed over tokens and divided by the valid ones.

    From the logits of each gate: of a row of L tokens, coeff L times the sum over experts of f P, f being E / K times
    the share of tokens that chose an expert and P the mean of its share of a token's scores.
    """
    logits_of: dict[str, Tensor] = {}
    handles = [
        router.gate.register_forward_hook(lambda module, given, out, name=name: logits_of.update({name: out}))
        for name, router in routers(model).items()
    ]
    positions = Positions(batch.positions_BL, batch.documents_BL) if mask == "document" else None
    main = cross_entropy(model(batch.tokens_BL, positions), batch.labels_BL)
    for handle in handles:
        handle.remove()
    balance = torch.zeros(())
    for logits_BLE in logits_of.values():
        for logits_LE in logits_BLE:
            length, n_experts = logits_LE.shape
            share_LE = logits_LE.softmax(-1)
            top = [sorted(range(n_experts), key=lambda e: -row[e])[:2] for row in logits_LE.tolist()]
            for e in range(n_experts):
                f = n_experts / 2 * sum(e in chosen for chosen in top) / length
                balance = balance + coeff * length * f * share_LE[:, e].mean()
    return main / valid_tokens([batch]), balance / valid_tokens([batch])


@pytest.mark.parametrize("sizes", [[6], [3, 3], [1, 1, 4]], ids=str)
@pytest.mark.parametrize("mask", ["causal", "document"])
def test_balance_loss_shares_the_denominator_of_the_step(sizes, mask):
    """The gradient is that of the explicit sum, however the step is split; reported apart from the loss."""
    batch = rows(6)
    model, oracle = build_moe(balance_loss_coeff=0.5), build_moe(balance_loss_coeff=0.0)
    main, balance = explicit_total(oracle, batch, 0.5, mask)
    (main + balance).backward()
    info = step(model, split(batch, sizes), mask=mask)
    assert info.loss == pytest.approx(main.item(), rel=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert load_metrics(layer_loads(model), balance_loss(model))["moe/balance_loss"] == pytest.approx(
        balance.item(), rel=1e-5
    )
    plain = build_moe(balance_loss_coeff=0.0)
    step(plain, [batch], mask=mask)
    gates = [(a.gate.weight.grad, b.gate.weight.grad) for a, b in zip_routers(model, plain)]
    assert all((a - b).norm() > 0.01 * b.norm() for a, b in gates), "the balance loss is too small to be seen"
    assert "moe/balance_loss" not in load_metrics(layer_loads(plain), balance_loss(plain))


def zip_routers(a: Decoder, b: Decoder):
    return zip(routers(a).values(), routers(b).values(), strict=True)


def test_balance_loss_is_no_part_of_evaluation():
    model, batch = build_moe(balance_loss_coeff=0.5, load_balance_coeff=None), rows(6)
    step(model, [batch])
    before = load_metrics(layer_loads(model), balance_loss(model))
    model.eval()
    model.zero_grad()
    objective(model)(batch).total.backward()
    plain = build_moe(balance_loss_coeff=0.0, load_balance_coeff=None).eval()
    objective(plain)(batch).total.backward()
    for a, b in zip_routers(model, plain):
        torch.testing.assert_close(a.gate.weight.grad, b.gate.weight.grad)
    assert load_metrics(layer_loads(model), balance_loss(model)) == before


def joint(weights_) -> float:
    return torch.stack([weight.grad.norm() for weight in weights_]).norm().item()


def test_a_group_is_clipped_by_itself_and_values_one_by_one() -> None:
    """Norms before clipping are told of the group and of all; each is scaled to its own limit, or by a stated norm."""
    batch, plain, model = rows(4), build(), build()
    whole = step(plain, [batch])
    info = step(model, [batch], max_norm=0.5 * whole.grad_norm, groups=[Group(pattern="layers.*", max_norm=1e-3)])
    inside = {name: weight for name, weight in model.named_parameters() if name.startswith("layers.")}
    outside = {name: weight for name, weight in model.named_parameters() if name not in inside}
    before = dict(plain.named_parameters())
    assert info.grad_norm == pytest.approx(whole.grad_norm, rel=1e-6)
    assert info.group_norms == {"layers.*": pytest.approx(joint(before[name] for name in inside), rel=1e-6)}
    assert joint(inside.values()) == pytest.approx(1e-3, rel=1e-2)
    rest = joint(before[name] for name in outside)
    assert joint(outside.values()) == pytest.approx(min(rest, 0.5 * whole.grad_norm), rel=1e-4)
    stated = build()
    assert step(stated, [batch], max_norm=0.3, fixed_norm=2.0).grad_norm == whole.grad_norm
    for name, weight in stated.named_parameters():
        torch.testing.assert_close(weight.grad, before[name].grad * 0.15)
    cut, most = build(), 0.5 * before["norm.weight"].grad.abs().max().item()
    step(cut, [batch], max_value=most)
    for name, weight in cut.named_parameters():
        assert torch.equal(weight.grad, before[name].grad.clamp(-most, most)), name
