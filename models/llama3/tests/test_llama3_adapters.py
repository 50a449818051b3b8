"""Adapters of a Llama 3, whose queries and keys are rotated in other pairs at Hugging Face, to a folder of peft's and
back, and on from there."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from core.config.errors import UserError
from core.data.tokenizer import Tokenizer, bundled_model
from core.data.tokenizer_json import read_model, tokenizer_json
from core.generate import command as generate
from core.quantization.lora import LoRAConverter
from core.step.converted import SAMPLE, base_problems
from core.testing.adapter_suite import (
    TOKENS,
    adapter_run,
    check_commands_with_peft,
    logits_after,
    logits_in_peft,
    logits_of,
)
from core.train.trainer import Trainer
from core.weights import convert
from llama3 import configs
from llama3.model import Llama3


def other_ids(stated: dict[str, Any]) -> dict[str, Any]:
    """A `tokenizer.json` in which the pieces of several letters have other ids, each that of the next."""
    vocab = stated["model"]["vocab"]
    pieces = [piece for piece, number in vocab.items() if number >= 300]
    moved = dict(zip(pieces, [*(vocab[piece] for piece in pieces[1:]), vocab[pieces[0]]], strict=True))
    return {**stated, "model": {**stated["model"], "vocab": vocab | moved}}


class OwnTokenizer(Tokenizer):
    """A class of one's own, which finds its file in another way."""

    @dataclass(kw_only=True, slots=True)
    class Config(Tokenizer.Config):
        place: str

    def __init__(self, config: Any) -> None:
        super().__init__(Tokenizer.Config(path=config.place))


class Tuned:
    """A folder with the base, a run that adapted it, and what its adapters are to peft; the logits of its model."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.config = adapter_run(configs.llama3_debug(), folder, LoRAConverter.Config(rank=4, alpha=8.0, **settings))
        self.expected = logits_after(self.config)
        convert.main({"llama": Llama3}, ["to-hf", str(folder / "run"), str(folder / "peft"), "--peft"])


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def tuned(request: Any, tmp_path_factory: Any) -> Tuned:
    return Tuned(tmp_path_factory.mktemp("tuned"), dora=request.param)


def test_a_folder_of_peft_is_read_back(tuned: Tuned) -> None:
    convert.main({"llama": Llama3}, ["from-hf", str(tuned.folder / "peft"), str(tuned.folder / "merged")])
    found = logits_of(tuned.config, tuned.folder / "merged")
    torch.testing.assert_close(found, tuned.expected, rtol=0, atol=1e-5)


def test_a_folder_of_peft_for_weights_of_ours_is_read(tuned: Tuned, tmp_path: Path) -> None:
    peft = Path(shutil.copytree(tuned.folder / "peft", tmp_path / "peft"))
    convert.main({"llama": Llama3}, ["from-hf", str(tuned.folder / "base"), str(tmp_path / "ours")])
    stated = json.loads((peft / "adapter_config.json").read_text())
    (peft / "adapter_config.json").write_text(json.dumps(stated | {"base_model_name_or_path": str(tmp_path / "ours")}))
    convert.main({"llama": Llama3}, ["from-hf", str(peft), str(tmp_path / "merged")])
    found = logits_of(tuned.config, tmp_path / "merged")
    torch.testing.assert_close(found, tuned.expected, rtol=0, atol=1e-5)


def test_the_tokenizer_goes_along_with_adapters(tuned: Tuned) -> None:
    """As programs that train adapters have it; nothing else of the base does."""
    names = {path.name for path in (tuned.folder / "peft").iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    own = Tokenizer(tuned.config.tokenizer)
    assert AutoTokenizer.from_pretrained(tuned.folder / "peft")(SAMPLE).input_ids == own.encode_prompt(SAMPLE)


@pytest.mark.filterwarnings("ignore")  # warnings of other programs are theirs
def test_peft_computes_the_same(tuned: Tuned) -> None:
    found = logits_in_peft(tuned.folder / "base", tuned.folder / "peft")
    torch.testing.assert_close(found, tuned.expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # warnings of other programs are theirs
def test_commands_say_of_a_folder_what_peft_says(tuned: Tuned, capsys: Any) -> None:
    check_commands_with_peft(configs, tuned.folder / "base", tuned.folder / "peft", capsys)


def test_a_run_begins_with_the_adapters_of_a_folder(tuned: Tuned) -> None:
    config = tuned.config
    config.checkpoint.initial_load_path, config.dump_folder = str(tuned.folder / "peft"), str(tuned.folder / "on")
    trainer: Trainer = config.build()
    with torch.no_grad():
        found = trainer.built.models[0].eval()(TOKENS)
    torch.testing.assert_close(found, tuned.expected, rtol=0, atol=1e-5)
    trainer.built.models[0].train()
    _, folder = trainer.run()
    with torch.no_grad():
        expected = trainer.built.models[0].eval()(TOKENS)
    torch.testing.assert_close(logits_of(config, folder), expected, rtol=0, atol=1e-5)
    (adapters,) = config.converters
    assert isinstance(adapters, LoRAConverter.Config)
    config.dump_folder = str(tuned.folder / "other")
    stated = json.loads((tuned.folder / "peft/adapter_config.json").read_text())
    for setting, value, words in (
        ("rank", 8, r"converters\.0\.rank: rank 8, and .*peft has 4 for layers\.0\.attention\.wk: set rank 4"),
        ("alpha", 16.0, r"converters\.0\.alpha: alpha 16, and .*peft has 8 for .*: set alpha 8"),
        ("dora", not stated["use_dora"], f"dora {not stated['use_dora']}, and .* has use_dora {stated['use_dora']}"),
        ("patterns", ["*.attention.*"], r"peft has adapters of layers\.\*\.feed_forward\.w1, .* and the recipe none"),
    ):
        before = getattr(adapters, setting)
        setattr(adapters, setting, value)
        with pytest.raises(UserError, match=words):
            config.build()
        setattr(adapters, setting, before)
    config.converters = []
    without: Trainer = config.build()
    with torch.no_grad():
        merged = without.built.models[0].eval()(TOKENS)
    torch.testing.assert_close(merged, tuned.expected, rtol=0, atol=1e-5)


def test_a_tokenizer_beside_adapters_is_theirs(tuned: Tuned, tmp_path: Path, capsys: Any) -> None:
    """As long as they have none it is that of the base; a run of adapters does not learn with another."""
    base, peft = (Path(shutil.copytree(tuned.folder / name, tmp_path / name)) for name in ("base", "peft"))
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (peft / name).unlink()
    stated = json.loads((peft / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (peft / "adapter_config.json").write_text(json.dumps(stated))
    (base / "tokenizer.model").write_bytes(bundled_model())
    own = tokenizer_json(read_model(bundled_model()), None)  # which begins no text
    asked = ["--checkpoint", str(peft), "--prompt", "a page", "--max_new_tokens", "1", "--device", "cpu"]
    config = replace(tuned.config, converters=[LoRAConverter.Config(rank=4, alpha=8.0)])
    config.checkpoint = replace(config.checkpoint, initial_load_path=str(peft))
    for place in (base / "tokenizer.model", peft / "tokenizer.json"):
        if place.parent == peft:
            place.write_text(own)
        generate.main(configs, asked)
        told = " ".join(capsys.readouterr().err.split())
        assert f"({place}), that of the checkpoint" in told
        assert (f"with a tokenizer of their own, whose files are not those of {base}" in told) == (place.parent == peft)
        assert not list(base_problems(str(peft), config.tokenizer))  # the same tokens in another file
    convert.main({"llama": Llama3}, ["from-hf", str(peft), str(tmp_path / "merged")])
    merged = tmp_path / "merged"
    assert (merged / "tokenizer.json").read_text() == own and not (merged / "tokenizer.model").exists()
    (peft / "tokenizer.json").write_text(json.dumps(other_ids(json.loads(own))))
    with pytest.raises(UserError, match=rf"tokenizer\.path: the weights .* use --tokenizer\.path {peft}$"):
        config.build()
    assert list(base_problems(str(peft), Tokenizer.Config(path=str(base))))
    assert not list(base_problems(str(peft), Tokenizer.Config(path=str(peft))))
    assert not list(base_problems(str(peft), OwnTokenizer.Config(place=str(peft))))
