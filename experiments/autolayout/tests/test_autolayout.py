"""Layouts: counted, refused with reasons, estimated as the planner plans, and the best chosen."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from autolayout import configs, trainer
from autolayout.estimate import Estimate, Estimator
from autolayout.hardware import H100, Hardware, hardware
from autolayout.layout import Layout, applied, candidates, possible, rows_per_step
from autolayout.messages import Wires, is_fsdp
from autolayout.picture import front, picture
from autolayout.published import RUNS, Published, place_of
from autolayout.search import Found, command, main, planned_bytes, search
from autolayout.trainer import AutolayoutTrainer
from core.config import cli
from core.config.errors import UserError
from core.config.recipe import load_config, recipes
from core.config.record import diff
from core.config.validate import validate
from core.nn.attention import Attention
from core.plan.plan import plan
from core.plan.segments import MessageKind
from core.train.trainer import Trainer
from llama3.configs import llama3_70b
from qwen3 import configs as qwen3_configs
from qwen3.configs import qwen3_8b, qwen3_debug, qwen3_moe_debug

NO_DELAY = {"inner_delay_us": 0, "outer_delay_us": 0}


def small_run() -> Trainer.Config:
    """A model whose weights and activations are of like size, for ranks of GPUs."""
    config = qwen3_debug()
    config.model.dim, config.model.n_layers, config.model.vocab_size, config.model.tie_embeddings = 256, 2, 4096, False
    config.model.attention = Attention.Config(n_heads=8, n_kv_heads=4, head_dim=32, qk_norm=True)
    config.training.seq_len, config.training.local_batch_size = 2048, 2
    return config


@pytest.fixture(scope="module")
def estimator() -> Estimator:
    return Estimator(small_run(), 8, H100)


@pytest.fixture(scope="module")
def found() -> Found:
    config = load_config(["qwen3_debug"], qwen3_configs)
    assert isinstance(config, Trainer.Config)
    config.model.n_layers, config.training.local_batch_size = 1, 2
    return search(config, 1, H100)


def test_a_layout_leaves_the_rows_of_a_step_and_changes_nothing_else() -> None:
    config = small_run()
    for layout in list(candidates(config, 8, ranks_per_host=4))[::7]:
        run = applied(config, layout, 8)
        degrees = run.parallelism.degrees(8)
        assert degrees.world == 8 and degrees.tensor <= 4
        assert run.training.global_batch_size == rows_per_step(config, 8) == 16
        changed = {path.partition(".")[0] for path, _, _ in diff(run, config)}
        assert changed <= {"parallelism", "training", "activation_checkpoint"}


def test_every_layout_is_possible_or_has_a_reason() -> None:
    config = small_run()
    layouts = [each for each in candidates(config, 8, ranks_per_host=8) if each.mode == "full" and not each.offload]
    passed, refused = possible(config, 8, layouts)
    assert sorted(map(str, [*passed, *(each for some in refused.values() for each in some)])) == sorted(
        map(str, layouts)
    )
    (reason,) = [key for key, some in refused.items() if any(each.tensor == 8 for each in some)]
    assert "tensor_parallel_degree 8" in reason and "4" in reason  # 4 heads of keys


def test_experts_are_spread_as_well() -> None:
    offered = {each.expert for each in candidates(qwen3_moe_debug(), 4, ranks_per_host=4)}
    passed, _ = possible(qwen3_moe_debug(), 4, (Layout(expert=n, tensor=2) for n in (1, 2, 4, 8)))
    assert offered == {each.expert for each in passed} == {1, 2, 4}


LAYOUTS = [
    Layout(rows=2),
    Layout(rows=1, mode="full"),
    Layout(tensor=2, rows=2, mode="none"),
    Layout(context=2, rows=2),
    Layout(pipeline=2, rows=1),
    Layout(rows=2, offload=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_estimate_is_near_what_the_planner_plans(layout: Layout, estimator: Estimator) -> None:
    config = small_run()
    found = estimator(layout)
    resting, peak = planned_bytes(config, layout, 8)
    assert found.peak_bytes == pytest.approx(peak, rel=0.15)
    assert found.resting_bytes == pytest.approx(resting, rel=0.01)
    assert found.peak_gib * 2**30 == pytest.approx(
        found.peak_bytes + H100.reserve * (found.peak_bytes - found.resting_bytes)
    )
    assert found.seconds == pytest.approx(sum(found.parts.values()))


def test_what_is_computed_and_sent_is_what_the_planner_counts(estimator: Estimator) -> None:
    layout = Layout(tensor=2, rows=2)
    found = plan(applied(small_run(), layout, 8), world_size=8, rank=0)
    measured = estimator.measurements.of(layout)
    parts = [*measured.forward.values(), *measured.backward.values(), *measured.head]
    assert found.microbatches == 2 and 2 * 2 * sum(part.flops for part in parts) == found.flops
    sent = sum(line.at(2) for part in parts for kind, line in part.sent.items() if kind.axis == "tensor")
    assert 2 * sent == sum(each.bytes for each in found.traffic if each.axis == "tensor")


def test_keys_and_values_of_context_ranks_are_waited_for_and_weights_are_not(
    estimator: Estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the context ranks are all ranks, along which weights are shared as well."""
    monkeypatch.setattr(estimator, "hardware", replace(H100, **NO_DELAY))
    weights, waited = [], []
    for context in (1, 2, 8):
        layout = Layout(context=context, rows=2, mode="none")
        measured = estimator.measurements.of(layout)
        parts = [*measured.forward.values(), *measured.backward.values(), *measured.head]
        weights.append(sum(line.fixed for part in parts for kind, line in part.sent.items() if is_fsdp(kind.axis)))
        waited.append(estimator(layout).parts.get("context", 0.0))
    assert weights[0] == weights[1] == weights[2] > 0
    keys_and_values = 2 * 2048 * 4 * 32 * 2  # of a row, in 16 bits
    passes = 2 * 2  # of two blocks: gathered, and their gradients scattered
    for n, rows, seconds in ((2, 4, waited[1]), (8, 16, waited[2])):
        sent = passes * keys_and_values * (n - 1) / n * rows
        assert seconds == pytest.approx(sent / (H100.inner_gb_s * 1e9))
    assert waited[0] == 0


def test_times_follow_the_hardware(estimator: Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, slower = Layout(tensor=2, rows=2), {"matmul_tflops": H100.matmul_tflops / 2, "inner_gb_s": 100}
    found = []
    for changes in ({}, slower):
        monkeypatch.setattr(estimator, "hardware", replace(H100, **NO_DELAY | changes))
        found.append(estimator(layout))
    usual, slow = found
    assert slow.parts["products"] == pytest.approx(2 * usual.parts["products"])
    assert slow.parts["tensor"] == pytest.approx(4 * usual.parts["tensor"])
    assert slow.parts["memory"] == usual.parts["memory"]


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(tensor=2, rows=2)], ids=str)
def test_weights_that_no_computation_hides_are_waited_for(
    layout: Layout, estimator: Estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing to compute, all bytes that the planner counts, and gradients once in a step, as nothing in a step of
    several microbatches sums them before."""
    rates = dict.fromkeys(("matmul_tflops", "attention_tflops", "memory_gb_s"), 1e30)
    monkeypatch.setattr(estimator, "hardware", replace(H100, **NO_DELAY | rates, contention=0.5))
    planned = plan(applied(small_run(), layout, 8), world_size=8, rank=0)
    sent = sum(each.bytes for each in planned.traffic if is_fsdp(each.axis))
    parts = estimator(layout).parts
    assert parts["weights and gradients"] == pytest.approx(sent / 400e9, rel=1e-3) and parts["contention"] < 1e-20


def test_weights_that_a_computation_hides_slow_it_down(estimator: Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, times = Layout(rows=2, mode="none"), []
    for bandwidth in (1e3, 1e6):
        slow = {"memory_gb_s": 1e-3, "inner_gb_s": bandwidth, "contention": 0.5}
        monkeypatch.setattr(estimator, "hardware", replace(H100, **NO_DELAY | slow))
        times.append(estimator(layout).parts)
    assert times[0]["contention"] == pytest.approx(1000 * times[1]["contention"]) and times[0]["contention"] > 0
    assert times[0]["memory"] == times[1]["memory"]


@pytest.mark.parametrize(
    ("layout", "axis", "collective", "expected"),
    [
        (Layout(), "shard", "all-gather", 56 + 800),  # 64 ranks of 8 hosts
        (Layout(), "shard", "all-reduce", 2 * 3 + 2 * 300),
        (Layout(tensor=8), "shard", "reduce-scatter", 800),  # one of each host
        (Layout(tensor=4), "tensor", "all-gather", 3),
        (Layout(tensor=4, context=4), "context", "all-gather", 2 + 200),
        (Layout(pipeline=8, tensor=8), "shard", "all-gather", 0),  # there is no other
    ],
    ids=str,
)
def test_a_message_goes_from_rank_to_rank(layout: Layout, axis: str, collective: str, expected: float) -> None:
    wires = Wires(layout, replace(H100, inner_delay_us=1, outer_delay_us=100), 64)
    assert wires.delay(MessageKind(axis, collective)) == pytest.approx(expected / 1e6)


def test_a_pipeline_waits_less_with_more_microbatches(estimator: Estimator) -> None:
    shares = []
    for rows in (1, 2):  # of the 4 that each of 4 data ranks has in a step
        found = estimator(Layout(pipeline=2, rows=rows))
        work = found.seconds - found.parts["bubble"] - found.parts["update"]
        shares.append(found.parts["bubble"] / work)
    assert shares == [pytest.approx(1 / 4), pytest.approx(1 / 2)]


def test_the_fastest_that_fits_is_chosen(found: Found) -> None:
    fits = [each for each in found.estimates if each.peak_gib <= H100.memory_gib]
    assert found.best[0].seconds == min(each.seconds for each in fits)
    for each in found.best[:1]:
        assert each.peak_bytes == plan(applied(found.config, each.layout, 1), world_size=1, rank=0).peak_bytes


def test_what_the_allocator_takes_more_is_of_what_comes_and_goes() -> None:
    own = Estimate(layout=Layout(), peak_bytes=10 * 2**30, resting_bytes=4 * 2**30, reserve=0.5, seconds=1)
    assert own.peak_gib == 13 and replace(own, resting_bytes=11 * 2**30).peak_gib == 10


def test_the_command_trains_in_the_layout() -> None:
    config, layout = load_config(["qwen3_debug"], qwen3_configs), Layout(pipeline=2, tensor=2, rows=2, interleaved=True)
    assert isinstance(config, Trainer.Config)
    words = command(config, layout, 16, 8).replace("\\\n", " ").split()
    again = load_config(["qwen3_debug"], qwen3_configs)
    cli.override(again, cli.split_flags(words[words.index("qwen3_debug") + 1 :]))
    assert again == applied(config, layout, 16)
    assert words[:8] == ["torchrun", "--nnodes", "2", "--nproc-per-node", "8", "-m", "qwen3.train", "--config"]
    assert command(config, Layout(), 12, 8).startswith("torchrun --nnodes 3 --nproc-per-node 4 ")


def test_the_command_has_what_the_run_differs_in_from_its_recipe() -> None:
    """Of a run of ours it is not to search again, in which it would choose another layout than this one."""
    config = load_config(["autolayout_debug"], configs)
    assert isinstance(config, AutolayoutTrainer.Config)
    words = ["--training.seq_len", "64", "--model.rope.theta", "5000", "--device_memory_gib", "40"]
    cli.override(config, cli.split_flags(words))
    layout, again = Layout(tensor=2, mode="full"), load_config(["autolayout_debug"], configs)
    words = command(config, layout, 2, 8).replace("\\\n", " ").split()
    cli.override(again, cli.split_flags(words[words.index("autolayout_debug") + 1 :]))
    assert again == replace(applied(config, layout, 2), autolayout=False, device_memory_gib=None)


def test_where_nothing_fits_the_least_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter(range(50, 500))
    monkeypatch.setattr("autolayout.search.Estimator", lambda *_: lambda layout: estimate(1.0, next(sizes)))
    with pytest.raises(UserError, match=r"none of \d+ layouts fits 20 GiB; the least is .* with 50\.0 GiB"):
        search(qwen3_debug(), 1, replace(H100, memory_gib=20))


def estimate(seconds: float, gib: float) -> Estimate:
    return Estimate(layout=Layout(), peak_bytes=gib * 2**30, seconds=seconds)


def test_a_layout_has_its_place_among_those_that_fit() -> None:
    own = Layout(tensor=2, mode="full")
    found = [
        Estimate(layout=layout, peak_bytes=gib * 2**30, seconds=seconds)
        for layout, gib, seconds in (
            (Layout(), 90, 1.0),  # does not fit
            (Layout(tensor=4), 10, 1.5),
            (Layout(tensor=4, mode="full"), 5, 1.6),
            (Layout(tensor=2), 20, 1.8),
            (own, 10, 2.0),
            (Layout(mode="full"), 30, 3.0),
        )
    ]
    place = place_of(own, found, memory_gib=80)
    assert (place.rank, place.n, place.of_degrees, place.n_degrees, place.of_best) == (4, 5, 2, 3, 0.75)


def test_a_public_run_had_one_microbatch_without_a_pipeline() -> None:
    run = RUNS[1]  # 16 rows on 8 ranks
    for layout, could in (
        (Layout(rows=2), True),
        (Layout(rows=1), False),
        (Layout(tensor=2, rows=4), True),
        (Layout(tensor=2, rows=2), False),
        (Layout(pipeline=2, rows=1), True),
    ):
        assert run.could_be(layout) == could


def test_the_front_has_what_nothing_beats() -> None:
    points = [(3, 1), (2, 2), (2.5, 3), (1, 4), (1, 5), (4, 1)]
    beaten = {(s, g) for s, g in points for t, h in points if (t, h) != (s, g) and t <= s and h <= g}
    assert {(each.seconds, each.peak_gib) for each in front([estimate(*point) for point in points])} == set(
        points
    ) - beaten


def test_the_picture_has_every_layout() -> None:
    points = [estimate(seconds, 10 / seconds) for seconds in (1.0, 2.0, 4.0)]
    root = ElementTree.fromstring(picture(points, points[:1], room_gib=5))
    circles = root.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 3 + 1 + 3  # points, the best, the legend
    places = [(float(each.get("cx", "")), float(each.get("cy", ""))) for each in circles[:3]]
    assert places == sorted(
        places, key=lambda place: (-place[0], -place[1])
    )  # faster is lower, less memory to the left


def test_figures_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"like": "h100", "inner_gb_s": 100}))
    assert hardware(str(file)) == replace(H100, inner_gb_s=100)
    file.write_text(json.dumps(asdict(H100)))
    assert hardware(str(file)) == H100
    for data, words in {
        '{"inner_gb": 1}': "no figure inner_gb; did you mean inner_gb_s",
        '{"inner_gb_s": 0}': "inner_gb_s must be a number above 0, got 0",
        '{"inner_gb_s": Infinity}': "inner_gb_s must be a number above 0, got Infinity",
        '{"ranks_per_host": 7.5}': "ranks_per_host must be a whole number, got 7.5",
        '{"overlap": 1.5}': "overlap is a part of messages and must be at most 1, got 1.5",
        '{"like": "tpu"}': "no hardware 'tpu' to be like",
        '{"like": []}': r"no hardware \[\] to be like",
    }.items():
        file.write_text(data)
        with pytest.raises(UserError, match=words):
            hardware(str(file))
    file.write_text(json.dumps({"outer_gb_s": 25, "reserve": 0}))
    assert hardware("h100", str(file)) == replace(H100, outer_gb_s=25, reserve=0)
    with pytest.raises(UserError, match="no hardware h200; h100 are known"):
        hardware("h200")


def test_a_dry_run_says_what_was_searched_and_plans_the_layout_that_would_be_chosen(
    found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def searched(config: Trainer.Config, n: int, ranks: Hardware) -> Found:
        asked.append((n, ranks.memory_gib, ranks.outer_gb_s))
        return replace(found, config=config)

    monkeypatch.setattr(trainer, "search", searched)
    mine, file = tmp_path / "mine.json", tmp_path / "layouts.svg"
    mine.write_text('{"outer_gb_s": 7}')
    sizes = ["--model.n_layers", "1", "--training.local_batch_size", "2"]
    words = ["--config", "autolayout_debug", "--dry-run", "--world-size", "1", *sizes]
    figures = ["--device-memory-gib", "40", "--bandwidth", str(mine), "--picture", str(file)]
    cli.main(configs, [*words, "--autolayout", *figures])
    said = capsys.readouterr().out
    assert asked == [(1, 40, 7)] and said.index("layouts of autolayout_debug") < said.index("autolayout_debug: rank 0")
    assert f"{found.best[0].peak_bytes / 2**20:12.3f}" in said
    assert "-m autolayout.train --config autolayout_debug \\\n    --no-autolayout \\\n    --model.n_layers 1" in said
    assert str(mine) not in said
    assert ElementTree.parse(file).getroot().tag.endswith("svg")
    cli.main(configs, [*words, "--no-autolayout"])
    assert len(asked) == 1 and capsys.readouterr().out.startswith("autolayout_debug: rank 0")


def test_the_command_prints_the_table_and_draws(
    found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rooms = []
    monkeypatch.setattr("autolayout.search.search", lambda run, n, ranks, say: rooms.append(ranks.memory_gib) or found)
    file, words = tmp_path / "layouts.svg", ["--config", "qwen3.configs:qwen3_debug", "--world-size", "1"]
    main(configs, [*words, "--device-memory-gib", "40", "--picture", str(file)])
    said = capsys.readouterr().out
    assert (
        rooms == [40] and "layouts of qwen3_debug on 1 ranks" in said and "-m qwen3.train --config qwen3_debug" in said
    )
    assert ElementTree.parse(file).getroot().tag.endswith("svg")
    for wrong, told in (
        (["--picture", str(tmp_path / "nowhere" / "layouts.svg")], "choose another --picture"),
        (["--device-memory-gib", "0"], "--device-memory-gib 0 must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(configs, [*words, *wrong])
        assert told in capsys.readouterr().err and len(rooms) == 1, "it was searched before"


def test_one_rank_draws(found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trainer, "search", lambda *_: found)
    config, file = configs.autolayout_debug(), tmp_path / "layouts.svg"
    config.picture = str(file)
    trainer.chosen(config, 1, 1)
    assert not file.exists()
    trainer.chosen(config, 1, 0)
    assert file.exists()


@pytest.mark.matrix
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_public_runs_are_predicted_within_a_quarter(run: Published) -> None:
    """Speed and memory of all; README.md has further ones of rows up to 262,144 tokens."""
    rate, gib = run.predicted()
    assert rate == pytest.approx(run.tokens_per_second, rel=0.25) and gib == pytest.approx(run.gib, rel=0.25)


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("run", [RUNS[1], RUNS[7]], ids=str)
def test_public_layouts_are_among_the_best_five(run: Published) -> None:
    """Exactly, and so their degrees, of 8B; README.md has those of which it is not so."""
    found = run.place()
    assert found.of_degrees <= found.rank <= 5


def test_recipes_differ_from_those_that_they_are_derived_from_in_the_search() -> None:
    derived = {"autolayout_debug": qwen3_debug, "autolayout_qwen3_8b": qwen3_8b, "autolayout_llama3_70b": llama3_70b}
    assert recipes(configs).keys() == derived.keys()
    for name, recipe in recipes(configs).items():
        config = recipe()
        validate(config)
        assert isinstance(config, AutolayoutTrainer.Config)
        found = {path: value for path, _, value in diff(config, derived[name]()) if value is not ...}
        own = {"autolayout": True, "hardware": "h100", "bandwidth": None, "device_memory_gib": None, "picture": None}
        assert found == {"class": "autolayout.trainer:AutolayoutTrainer"} | own
