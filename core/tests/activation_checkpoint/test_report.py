"""The report: predicted bytes are those that a real forward leaves, its numbers are those of the policy."""

import json
import sys
from xml.etree import ElementTree

import pytest
import torch

from core.activation_checkpoint.apply import ActivationCheckpoint
from core.activation_checkpoint.meter import Meter
from core.activation_checkpoint.report import MODES, main
from core.activation_checkpoint.survey import ranges, survey
from core.testing.toy import Toy, on_cpu

WIDE = {"dim": 64, "n_layers": 3, "max_seq_len": 256}
SHAPE = (3, 128)

RECIPES = """
from core.testing.toy import Toy
from core.step.settings import Training
from core.train.trainer import Trainer


def small() -> Trainer.Config:
    return Trainer.Config(
        model=Toy.Config(vocab_size=2048, max_seq_len=4096),
        training=Training(seq_len=64, local_batch_size=2, device="cpu"),
    )
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_predicted_bytes_are_the_measured_ones(mode, dtype, tmp_path):
    config = ActivationCheckpoint.Config(mode=mode)
    predicted = survey(Toy.Config(**WIDE), config, shape=SHAPE, dtype=dtype)
    model = on_cpu(Toy.Config(**WIDE))
    config.build(folder=tmp_path).apply(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False), Meter() as meter:
        x_BLD = model(torch.zeros(SHAPE, dtype=torch.int64), read=lambda x_BLD, head, depth: x_BLD)
        measured = meter.alive
    assert x_BLD.requires_grad
    assert predicted.saved + predicted.outside == pytest.approx(measured, rel=0.02)


def test_selective_numbers_are_those_of_the_policy():
    modes = {
        mode: survey(Toy.Config(**WIDE), ActivationCheckpoint.Config(mode=mode), shape=SHAPE, dtype=torch.float32)
        for mode in MODES
    }
    assert modes["none"].saved > modes["selective"].saved > modes["full"].saved
    assert modes["none"].outside == modes["selective"].outside == modes["full"].outside
    assert modes["none"].recomputed_share == 0 and modes["full"].recomputed_share == 1
    (kind,) = modes["selective"].kinds
    assert (kind.blocks, kind.n_blocks) == ("0-2", 3)
    products = {row.fate: row.count for row in kind.rows if row.op == "aten.mm.default"}
    assert products == {"saved": 4, "recomputed": 3}
    tokens, c = SHAPE[0] * SHAPE[1], Toy.Config(**WIDE)
    q, kv, hidden = 4 * 8, 2 * 8, c.feed_forward.hidden_dim
    again = 2 * tokens * c.dim * (kv + q + hidden)  # wk, wo, w3
    attention = 4 * tokens * SHAPE[1] * q
    forward = 2 * tokens * c.dim * (2 * q + 2 * kv + 3 * hidden) + attention
    assert kind.flops("recomputed") == again and kind.flops() == forward
    assert modes["selective"].recomputed_share == pytest.approx(again / forward)


def test_full_keeps_one_row_of_activations_per_block():
    found = survey(Toy.Config(**WIDE), ActivationCheckpoint.Config(mode="full"), shape=SHAPE, dtype=torch.float32)
    assert found.kinds[0].saved == SHAPE[0] * SHAPE[1] * WIDE["dim"] * 4


def test_command_prints_writes_and_draws(tmp_path, monkeypatch, capsys):
    package = tmp_path / "toyruns"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "configs.py").write_text(RECIPES)
    monkeypatch.syspath_prepend(tmp_path)
    main(["--model", "toyruns", "--config", "small", "--output", str(tmp_path / "out"), "--training.seq_len", "32"])
    out = capsys.readouterr().out
    assert "small: 2 blocks, 2 x 32 tokens, compute in float32" in out
    data = json.loads((tmp_path / "out/report.json").read_text())["modes"]
    assert list(data) == list(MODES)
    for mode in MODES:
        assert f"{data[mode]['kinds'][0]['saved'] / 2**20:,.1f} MiB" in out
    drawn = ElementTree.parse(tmp_path / "out/report.svg").getroot()
    words = [node.text for node in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert set(MODES) <= set(words)
    heights = [float(node.get("cy", "")) for node in drawn.iter("{http://www.w3.org/2000/svg}circle")]
    assert heights == sorted(heights) and heights[0] < heights[-1]
    sys.modules.pop("toyruns.configs")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model PACKAGE and --config NAME"),
        (["--model", "nothing_here", "--config", "x"], "no package nothing_here"),
    ],
)
def test_mistakes_are_told(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_ranges_read_well():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
