"""The command that converts weights: both ways, tensor by tensor, all or nothing."""

import json
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from weight_trees import Weights

from core.activation_checkpoint.meter import Meter
from core.config.configurable import Configurable
from core.config.record import from_json
from core.testing.toy import KEYS, Toy, on_cpu, randomise
from core.weights import files, shard_file
from core.weights.convert import PROGRAM, main
from core.weights.folder import load_folder, save_weights
from core.weights.hf import save_hf
from core.weights.hf_config import checked_hf_config
from core.weights.hf_form import HFForm
from core.weights.keys import KeyTable, Stacked, below
from core.weights.quantised import mxfp4, scaled

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GATE_UP, DOWN = "model.layers.{i}.mlp.experts.gate_up_proj", "model.layers.{i}.mlp.experts.down_proj"


class Dense(Toy):
    """The toy with rows in another order there, and a config.json that says how many blocks."""

    @classmethod
    def hf_form(cls) -> HFForm:
        return HFForm(
            keys=KEYS,
            halves=frozenset({"layers.{i}.attention.wq.weight", "layers.{i}.attention.wk.weight"}),
            from_config=lambda hf: cls.read(checked_hf_config(hf, {"model_type": "dense"})),
            to_config=lambda c: {"model_type": "dense", "layers": c.n_layers, "tied": c.tie_embeddings},
        )

    @classmethod
    def read(cls, hf: dict) -> Any:
        return cls.Config(n_layers=int(hf["layers"]), tie_embeddings=hf["tied"])


EXPERTS: KeyTable = {
    "router.bias": "mlp.router.bias",
    "count": None,
    "w1.weight": ("mlp.experts.{e}.gate.weight", Stacked("mlp.experts.gate_up_proj", "even", transposed=True)),
    "w3.weight": ("mlp.experts.{e}.up.weight", Stacked("mlp.experts.gate_up_proj", "odd", transposed=True)),
    "w2.weight": ("mlp.experts.{e}.down.weight", Stacked("mlp.experts.down_proj", transposed=True)),
}


class Sparse(Weights, Configurable):
    """Experts in every block, and a buffer that Hugging Face has no place for."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        n_layers: int = 2
        """Blocks."""
        n_experts: int = 3
        """Experts in each."""
        dim: int = 64
        """Columns of the first two matrices of an expert."""
        hidden_dim: int = 32
        """Their rows."""

    def __init__(self, config: Config) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        n, dim, hidden_dim = config.n_experts, config.dim, config.hidden_dim
        parts = {"router.bias": (n,), "count": (n,), "w1.weight": (n, hidden_dim, dim)}
        parts |= {"w3.weight": (n, hidden_dim, dim), "w2.weight": (n, dim, hidden_dim)}
        for i in range(config.n_layers):
            shapes |= {f"layers.{i}.{name}": shape for name, shape in parts.items()}
        buffers = tuple(name for name in shapes if name.endswith(("bias", "count")))
        super().__init__(below("layers.{i}", "model.layers.{i}", EXPERTS), shapes, buffers)
        self.config = config

    @classmethod
    def from_published(cls, hf: dict, *_: object) -> Config:
        return cls.Config(n_layers=hf["layers"], n_experts=hf["experts"])

    def to_hf_config(self) -> dict:
        return {"model_type": "sparse", "layers": self.config.n_layers, "experts": self.config.n_experts}


FAMILIES: dict[str, Any] = {"dense": Dense, "sparse": Sparse}


def convert(*words: str | Path) -> None:
    main(FAMILIES, [str(word) for word in words])


def stored(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def listing(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, but for the model card."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "README.md"}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    model = on_cpu(Dense.Config())
    randomise(model, 1)
    save_hf(model, tmp_path / "dense", shard_gib=5000 / 2**30)
    return tmp_path / "dense"


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    save_hf(Sparse.Config().build(), tmp_path / "sparse")
    return tmp_path / "sparse"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back_is_the_same(
    tmp_path: Path, tied: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights whole, or a few heads or rows at a time."""
    if tied:
        monkeypatch.setattr(shard_file, "STRETCH_BYTES", 100)
    model = on_cpu(Dense.Config(n_layers=3, tie_embeddings=tied), dtype=dtype)
    randomise(model, 1)
    there, here, back = tmp_path / "there", tmp_path / "here", tmp_path / "back"
    save_hf(model, there)
    convert("from-hf", there, here)
    assert from_json((here / "config.json").read_text()) == model.config
    weights = {name: value for name, value in model.state_dict().items() if not (tied and name == "output.weight")}
    assert_equal(stored(here), weights)
    other = on_cpu(Dense.Config(n_layers=3, tie_embeddings=tied), dtype=dtype)
    load_folder(other, here)
    assert_equal(other.state_dict(), model.state_dict())
    convert("to-hf", here, back)
    assert listing(back) == listing(there)


def test_files_of_the_size_that_is_asked_for(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, back = tmp_path / "here", tmp_path / "back"
    convert("from-hf", dense, here, "--shard-gib", str(9000 / 2**30))
    names = sorted(file.name for file in here.glob("*.safetensors"))
    assert len(names) > 2 and (here / INDEX).exists()
    assert all((here / name).stat().st_size < 9000 + 2000 for name in names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == names
    assert lines[0].endswith(" KiB")
    convert("to-hf", here, back, f"--shard-gib={5000 / 2**30}")
    assert listing(back) == listing(dense)


@pytest.mark.parametrize("way", ["from-hf", "to-hf"])
def test_weights_are_cast_and_buffers_are_not(sparse: Path, tmp_path: Path, way: str) -> None:
    src = sparse
    if way == "to-hf":
        convert("from-hf", sparse, src := tmp_path / "here")
    before = stored(src)
    convert(way, src, tmp_path / "cast", "--dtype", "bfloat16")
    after = stored(tmp_path / "cast")
    if way == "to-hf":
        assert json.loads((tmp_path / "cast" / "config.json").read_text())["dtype"] == "bfloat16"
        before = stored(sparse)
    names = set()
    for key, value in after.items():
        kept = key.endswith("bias")
        names.add(key.rpartition(".")[2])
        assert value.dtype == (torch.float32 if kept else torch.bfloat16), key
        if way == "to-hf":
            assert torch.equal(value, before[key].to(value.dtype)), key
    assert names == {"bias", "weight"}


def test_a_tokenizer_goes_along(dense: Path, tmp_path: Path) -> None:
    (dense / "tokenizer.json").write_text("{}")
    (dense / "tokenizer.model").write_bytes(b"\x00\x01")
    (dense / "LICENSE").write_text("as it is")
    (dense / "README.md").write_text("not this")
    convert("from-hf", dense, tmp_path / "here")
    convert("to-hf", tmp_path / "here", tmp_path / "back")
    for folder in (tmp_path / "here", tmp_path / "back"):
        assert (folder / "tokenizer.json").read_text() == "{}"
        assert (folder / "tokenizer.model").read_bytes() == b"\x00\x01"
        assert (folder / "LICENSE").read_text() == "as it is"
    assert not (tmp_path / "here/README.md").exists()
    assert "| model | Dense |" in (tmp_path / "back/README.md").read_text()


def test_end_tokens_go_along(dense: Path, tmp_path: Path) -> None:
    """Those that only config.json names, too; and what else generation_config.json says."""
    stated = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**stated, "eos_token_id": [7, 5], "bos_token_id": 1}))
    (dense / "generation_config.json").write_text('{"eos_token_id": 5, "temperature": 0.6}')
    convert("from-hf", dense, tmp_path / "here")
    convert("to-hf", tmp_path / "here", tmp_path / "back")
    ends = {"bos_token_id": 1, "eos_token_id": [5, 7]}
    assert json.loads((tmp_path / "back/generation_config.json").read_text()) == {"temperature": 0.6, **ends}
    assert json.loads((tmp_path / "back/config.json").read_text()) == {**stated, **ends, "pad_token_id": None}


def quantised(sparse: Path) -> dict[str, Tensor]:
    """Put drawn tensors of few bits into the folder; returns our weights as they must be read."""
    generator = torch.Generator().manual_seed(3)
    tensors, expected = load_file(sparse / SINGLE), {}
    for key in [key for key in tensors if key.startswith("model.layers.0.mlp.experts.")]:
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = torch.rand(1, 1, generator=generator)
    for name, part in {"w1": "gate", "w3": "up", "w2": "down"}.items():
        keys = [f"model.layers.0.mlp.experts.{e}.{part}.weight" for e in range(3)]
        values = [scaled(tensors[key], tensors[f"{key}_scale_inv"]) for key in keys]
        expected[f"layers.0.{name}.weight"] = torch.stack(values).bfloat16()
    for key in [key for key in tensors if key.startswith("model.layers.1.mlp.experts.")]:
        del tensors[key]
    packed = {}
    for key, rows, columns in ((GATE_UP, 64, 64), (DOWN, 64, 32)):
        shape = 3, rows, columns // 32, 16
        blocks = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 130, shape[:-1], generator=generator, dtype=torch.uint8)
        key = key.replace("{i}", "1")
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        packed[key] = mxfp4(blocks, scales).mT.bfloat16()
    expected["layers.1.w1.weight"] = packed[GATE_UP.replace("{i}", "1")][:, 0::2]
    expected["layers.1.w3.weight"] = packed[GATE_UP.replace("{i}", "1")][:, 1::2]
    expected["layers.1.w2.weight"] = packed[DOWN.replace("{i}", "1")]
    expected |= {f"layers.{i}.router.bias": tensors[f"model.layers.{i}.mlp.router.bias"] for i in (0, 1)}
    save_file(tensors, sparse / SINGLE)
    return expected


def test_few_bits_become_bfloat16(sparse: Path, tmp_path: Path) -> None:
    expected = quantised(sparse)
    convert("from-hf", sparse, tmp_path / "here")
    assert_equal(stored(tmp_path / "here"), expected)
    convert("to-hf", tmp_path / "here", tmp_path / "back")
    back = stored(tmp_path / "back")
    assert torch.equal(back["model.layers.0.mlp.experts.1.up.weight"], expected["layers.0.w3.weight"][1])
    convert("from-hf", tmp_path / "back", tmp_path / "again")
    assert_equal(stored(tmp_path / "again"), expected)


def test_what_hugging_face_cannot_hold_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_weights(Sparse.Config().build(), tmp_path / "here")
    convert("to-hf", tmp_path / "here", tmp_path / "there")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"layers.{i}.count has no place at Hugging Face: left out" for i in (0, 1)]
    assert not any("count" in key for key in stored(tmp_path / "there"))


class Peak(Meter):
    """Counts what is in memory, and not the model without."""

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type == "cpu":
            super()._count(storage)


@pytest.mark.parametrize("bits", ["many", "few"])
def test_a_few_stretches_are_in_memory(tmp_path: Path, bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there, here, back = tmp_path / "there", tmp_path / "here", tmp_path / "back"
    config = Sparse.Config(n_layers=12, n_experts=8)
    save_hf(config.build(), there)
    monkeypatch.setattr(shard_file, "STRETCH_BYTES", 100)
    row = config.hidden_dim * config.dim * 4
    """Bytes of the largest that is written at once: the matrix of one expert."""
    if bits == "few":
        tensors = load_file(there / SINGLE)
        for key in [key for key in tensors if ".experts." in key]:
            tensors[key] = tensors[key].to(torch.float8_e4m3fn)
            tensors[f"{key}_scale_inv"] = torch.ones(1, 1)
        save_file(tensors, there / SINGLE)
    shard = 24 * row + 1000
    for way, src, dst in (("from-hf", there, here), ("to-hf", here, back)):
        with Peak() as peak:
            convert(way, src, dst, "--shard-gib", str(shard / 2**30))
        assert sum(value.nbytes for value in stored(dst).values()) > 100 * row and len(listing(dst)) > 6
        assert row / 2 < peak.peak < 10 * row, way


def refused(capsys: pytest.CaptureFixture[str], message: str, *words: str | Path, code: int = 2) -> None:
    """The command ends with this code and message, and leaves no trace where it would have written."""
    parent = Path(words[2]).parent
    before = sorted(parent.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        convert(*words)
    assert ended.value.code == code
    assert message in capsys.readouterr().err
    assert sorted(parent.rglob("*")) == before


def test_a_destination_that_is_there(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken, file, free = tmp_path / "taken", tmp_path / "file", tmp_path / "deep" / "free"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    file.write_text("mine")
    for path in (taken, file):
        refused(capsys, f"error: {path} is there already: choose a folder that is empty", "from-hf", dense, path)
    free.mkdir(parents=True)
    convert("from-hf", dense, free)
    assert (free / "config.json").exists()
    convert("from-hf", dense, tmp_path / "a" / "b" / "c")
    assert listing(tmp_path / "a" / "b" / "c") == listing(free)
    refused(capsys, f"cannot write {file / 'below'}: Not a directory", "from-hf", dense, file / "below")
    long = tmp_path / ("long" * 100)
    refused(capsys, f"{long} cannot be read: File name too long", "from-hf", dense, long)


def test_a_destination_behind_a_link(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder takes the name of where the link leads; nothing can take that of a disk's place."""
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        (tmp_path / f"to {name}").symlink_to(name)
        convert("from-hf", dense, tmp_path / f"to {name}")
        assert (tmp_path / f"to {name}").is_symlink() and (tmp_path / name / "config.json").exists()
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mount")
    message = f"{tmp_path / 'mount'} is where a disk is mounted: choose a folder in it"
    refused(capsys, message, "from-hf", dense, tmp_path / "mount")


def test_a_source_of_another_kind(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, dst = tmp_path / "here", tmp_path / "dst"
    convert("from-hf", dense, here)
    refused(capsys, "nowhere/config.json cannot be read: No such file", "from-hf", tmp_path / "nowhere", dst)
    refused(capsys, "here/config.json states no model_type, not dense or sparse", "from-hf", here, dst)
    refused(capsys, "dense/config.json states no class", "to-hf", dense, dst)
    (dense / "config.json").write_text('{"model_type": "llama"}')
    refused(capsys, "dense/config.json states model_type llama, not dense or sparse", "from-hf", dense, dst)
    for stated, message in {
        '{"model_type": "dense"}': "this config.json does not state layers",
        '{"model_type": "dense", "layers": "two"}': "invalid literal for int() with base 10: 'two'",
        '{"model_type": "dense", "layers": [2]}': "int() argument must be a string",
    }.items():
        (dense / "config.json").write_text(stated)
        refused(capsys, f"error: {dense}/config.json: {message}", "from-hf", dense, dst)
    (dense / "config.json").write_text('{"model_type": ["dense"]}')
    refused(capsys, "dense/config.json states model_type ['dense'], not dense or sparse", "from-hf", dense, dst)
    (dense / "config.json").write_text('{"model_type": "dense", "layers": 0, "tied": false}')
    refused(capsys, "n_layers 0 must be at least 1", "from-hf", dense, dst)
    save_weights(on_cpu(Toy.Config()), tmp_path / "toy")
    both = "test_convert:Dense or test_convert:Sparse"
    refused(capsys, f"toy holds the weights of core.testing.toy:Toy, not of {both}", "to-hf", tmp_path / "toy", dst)


def test_a_source_that_is_not_whole(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, dst = tmp_path / "here", tmp_path / "dst"
    convert("from-hf", dense, here, "--shard-gib", str(5000 / 2**30))
    for way, src in (("from-hf", dense), ("to-hf", here)):
        last = sorted(src.glob("*.safetensors"))[-1]
        whole = last.read_bytes()
        last.write_bytes(whole[:-1])
        refused(capsys, f"{last} cannot be read", way, src, dst)
        last.unlink()
        index = json.loads((src / INDEX).read_text())["weight_map"]
        key, *_ = (key for key, file in index.items() if file == last.name)
        refused(capsys, f"{src} has no {last.name}, which the index wants for {key}", way, src, dst)
        save_file({"extra": torch.ones(1)}, last)
        refused(capsys, f"{last.name}: extra is unknown to Dense", way, src, dst)
        refused(capsys, " is missing", way, src, dst)


def test_a_file_that_cannot_be_written_leaves_nothing(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system lets this process write no file as large as one that comes after others, as if the disk were full."""
    words, here = ("--shard-gib", str(5000 / 2**30)), tmp_path / "here"
    convert("from-hf", dense, here, *words)
    for way, src, like in (("from-hf", dense, here), ("to-hf", here, dense)):
        sizes = [file.stat().st_size for file in sorted(like.glob("*.safetensors"))]
        assert sizes[0] < max(sizes)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) - 1, hard))
        try:
            refused(capsys, "File too large", way, src, tmp_path / "dst", *words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_broken_off_leaves_nothing(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []

    def breaking(file: Path, outputs: list[Any]) -> None:
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(file)
        shard_file.write_shard(file, outputs)

    monkeypatch.setattr(files, "write_shard", breaking)
    dst = tmp_path / "dst"
    refused(capsys, "interrupted", "from-hf", dense, dst, "--shard-gib", str(5000 / 2**30), code=130)
    assert len(saved) == 2 and {file.parent.parent for file in saved} == {tmp_path}
    assert all(file.parent.name.startswith(".dst.partial-") for file in saved)


def test_words_that_make_no_sense(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dst = tmp_path / "dst"
    refused(capsys, "--shard-gib 0.0 must be above 0", "from-hf", dense, dst, "--shard-gib", "0")
    refused(capsys, "invalid choice: 'int8'", "from-hf", dense, dst, "--dtype", "int8")
    refused(capsys, "invalid choice: 'of-hf'", "of-hf", dense, dst)


def test_the_shell_knows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convert("--help")
    usage = capsys.readouterr().out.partition("\n\n")[0]
    assert set(PROGRAM.takes) == {*re.findall(r"--[a-z0-9-]+", usage), "--help"}


def test_a_folder_of_a_stranger_runs_none_of_its_code(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config.json may name any class; the module is imported when it is trusted, and not before."""
    here, mark = tmp_path / "here", tmp_path / "it-ran"
    convert("from-hf", dense, here)
    (here / "armature_of_a_stranger.py").write_text(
        f"from pathlib import Path\nfrom core.nn.rope import RoPE\nPath({str(mark)!r}).touch()\nclass Odd(RoPE): pass\n"
    )
    stated = json.loads((here / "config.json").read_text())
    stated["rope"]["class"] = "armature_of_a_stranger:Odd"
    (here / "config.json").write_text(json.dumps(stated))
    monkeypatch.syspath_prepend(here)
    monkeypatch.chdir(here)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        convert("to-hf", here, tmp_path / "back")
    said = capsys.readouterr().err
    assert end.value.code == 2 and not mark.exists() and not (tmp_path / "back").exists()
    assert "rope.class: armature_of_a_stranger:Odd is code of" in said and "--trust armature_of_a_stranger" in said
    convert("to-hf", here, tmp_path / "back", "--trust", "armature_of_a_stranger")
    assert mark.exists() and (tmp_path / "back" / SINGLE).exists()
