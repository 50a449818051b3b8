"""What a run records of itself: read in another directory, by another version, or after it was moved."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from zlib import crc32

import pytest
import torch
from toy_run import toy_run

from core.checkpoint.manifest import manifest_digest
from core.checkpoint.settings import Checkpoint
from core.config.cli import main, override, split_flags
from core.config.errors import UserError
from core.config.recipe import load_config
from core.config.record import from_dict, from_json, located, to_dict, to_json
from core.data.samples import OLD_MODES
from core.data.text import StreamedText
from core.data.tokenizer import Tokenizer
from core.generate.command import Generation
from core.nn.decoder import Decoder
from core.optim.adam import Adam, AdamW
from core.parallel.settings import Parallelism
from core.step.loss import CrossEntropy
from core.step.settings import Compile
from core.testing.resume_suite import measured
from core.testing.toy import Toy, on_cpu
from core.train import debug_run
from core.train import trainer as trainer_module
from core.train.summary import compiled
from core.train.trainer import Trainer
from core.weights.folder import load_folder, save_weights
from core.weights.hf import save_hf


def run(config: Trainer.Config) -> dict[str, Any]:
    """Train, and read what the run says of itself."""
    trainer = config.build()
    trainer.run()
    return json.loads((trainer.folder / "config.json").read_text())


def test_a_record_names_the_same_places_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = toy_run(Path(), steps=2)
    shutil.copy(Path(debug_run.__file__).parents[1] / "data/tokenizer.model", "own.model")
    config.tokenizer.path = "own.model"
    assert not any(map(os.path.isabs, [config.dump_folder or "", config.dataloader.dataset]))
    first = run(config)
    assert first["tokenizer"]["path"] == str(tmp_path / "own.model")
    assert first["dataloader"]["dataset"] == str(tmp_path / "text")
    assert first["dataloader"]["cache_folder"] == str(tmp_path / "cache")
    assert first["dump_folder"] == str(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = from_json((tmp_path / "run/config.json").read_text())
    again.dump_folder = "again"
    second = run(again)
    assert second == {**first, "dump_folder": str(tmp_path / "elsewhere/again")}
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name).read_text().splitlines()] for name in METRICS]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    os.remove(tmp_path / "own.model")
    again.dump_folder = "third"
    with pytest.raises(UserError, match=f"^there is no tokenizer {tmp_path}/own.model: give the place"):
        again.build()


METRICS = ("run/metrics.jsonl", "elsewhere/again/metrics.jsonl")


def test_places_that_are_none_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    config = toy_run(Path())
    config.parallelism = Parallelism(pipeline_parallel_schedule_csv="a.csv")
    for dataset, expected in [
        ("stdlib", "stdlib"),
        ("hf:owner/name:part@train[:9]", "hf:owner/name:part@train[:9]"),
        ("hf:local:part@train", f"hf:{tmp_path}/local:part@train"),
        ("hf:local", f"hf:{tmp_path}/local"),
        ("a/../b/*.txt", f"{tmp_path}/b/*.txt"),
        ("~/books", "~/books"),
        ("/books", "/books"),
    ]:
        config.dataloader.dataset = dataset
        assert located(config).dataloader.dataset == expected and config.dataloader.dataset == dataset
    for path, expected in [(None, None), ("s3://a/b", "s3://a/b"), ("runs/a", f"{tmp_path}/runs/a")]:
        config.checkpoint.initial_load_path = path
        assert located(config).checkpoint.initial_load_path == expected
    there = located(config)
    assert there.parallelism.pipeline_parallel_schedule_csv == f"{tmp_path}/a.csv"
    assert there.tokenizer.path is None
    assert there.checkpoint.folder == config.checkpoint.folder  # below the run's own


def test_weights_to_begin_with_must_be_there(tmp_path: Path) -> None:
    config = toy_run(tmp_path)
    config.checkpoint = Checkpoint(enable=True, initial_load_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=f"^checkpoint.initial_load_path: there is no {tmp_path}/gone$"):
        config.build()


def test_a_moved_run_is_told_where_it_would_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_run(tmp_path, steps=1)
    run(config)
    config.training.mask = "causal"  # what auto stands for
    assert load_config([str(tmp_path / "run/config.json")], debug_run) == config
    assert "dump_folder" not in capsys.readouterr().err
    shutil.move(tmp_path / "run", tmp_path / "moved")
    load_config([str(tmp_path / "moved/config.json")], debug_run)
    said = capsys.readouterr().err
    assert f"says dump_folder {tmp_path}/run, where the run is written" in said
    assert f"add --dump_folder {tmp_path}/moved\n" in said


# Going on with another version


def saved(folder: Path) -> Trainer.Config:
    """The configuration of a run of which there is a checkpoint."""
    config = toy_run(folder, steps=2)
    config.checkpoint = Checkpoint(enable=True, interval=2)
    run(config)
    return config


def of_another_version(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let the checkpoint be one whose configuration another version wrote."""
    place = folder / "run/checkpoint/step-2"
    stated = json.loads((place / "config.json").read_text())
    change(stated)
    data = json.dumps(stated).encode()
    (place / "config.json").write_bytes(data)
    said = json.loads((place / "manifest.json").read_text())
    said["files"]["config.json"] = {"n_bytes": len(data), "crc32": f"{crc32(data):08x}"}
    del said["digest"]
    (place / "manifest.json").write_text(json.dumps({**said, "digest": manifest_digest(said)}))


def goes_on(config: Trainer.Config) -> int:
    """The step that a run goes on from."""
    trainer = config.build()
    trainer.exit.close()
    return trainer.checkpoints.start.step


def test_settings_that_a_checkpoint_does_not_know_are_no_change(tmp_path: Path) -> None:
    config = saved(tmp_path)

    def forget(stated: dict[str, Any]) -> None:
        del stated["debug"]["seed"], stated["lr_scheduler"]["decay_type"], stated["compile"]
        del stated["model"]["norm_eps"]
        stated["dataloader"]["dataset"] = "text"  # as earlier versions wrote it
        stated["metrics"]["gone"] = 3

    of_another_version(tmp_path, forget)
    assert goes_on(config) == 2
    config.debug.seed, config.lr_scheduler.decay_type = 5, "cosine"
    with pytest.raises(UserError) as caught:
        config.build()
    assert "\n  lr_scheduler.decay_type linear -> cosine\n  debug.seed 0 -> 5\n" in str(caught.value)
    assert "metrics" not in str(caught.value)


@pytest.mark.parametrize("mode", ["indexed", "streaming"])
def test_a_checkpoint_from_before_data_had_classes_goes_on_bit_for_bit(tmp_path: Path, mode: str) -> None:
    config = toy_run(tmp_path, steps=4)
    config.checkpoint = Checkpoint(enable=True, interval=2)
    indexed: Any = config.dataloader
    streamed = StreamedText.Config(dataset=indexed.dataset, validation_fraction=indexed.validation_fraction)
    config.dataloader, other = (indexed, streamed) if mode == "indexed" else (streamed, indexed)
    run(config)
    expected = measured(tmp_path / "run")

    def make_older(stated: dict[str, Any]) -> None:
        assert stated["dataloader"].pop("class") == OLD_MODES[mode]
        stated["dataloader"]["mode"] = mode

    of_another_version(tmp_path, make_older)
    config.checkpoint.load_step = 2
    run(config)
    assert measured(tmp_path / "run") == expected and len(expected) == 4
    config.dataloader = other
    with pytest.raises(UserError, match="dataloader.class core.data.text:.*Text -> core.data.text:.*Text"):
        config.build()


def test_the_optimizers_that_were_one_class_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As files, as a change of a recipe, as an option, and in a checkpoint that the run goes on from."""

    def older(stated: dict[str, Any], name: str = "AdamW") -> dict[str, Any]:
        stated["optimizer"] = {"name": name, **{k: v for k, v in stated["optimizer"].items() if k != "class"}}
        return stated

    monkeypatch.chdir(tmp_path)
    config = saved(tmp_path)
    adam = replace(config, optimizer=Adam.Config(lr=1e-2))
    assert from_dict(older(to_dict(config))) == config and from_dict(older(to_dict(config), "Adam")) == adam
    without = to_dict(config)
    without["optimizer"] = {"lr": 1e-2}
    assert from_dict(without, say=lambda _: None) == config
    (tmp_path / "mine.json").write_text('{"recipe": "debug", "optimizer": {"name": "Adam", "beta1": 0.8}}')
    configs = toy_configs(monkeypatch)
    assert load_config([str(tmp_path / "mine.json")], configs).optimizer == Adam.Config(lr=3e-3, beta1=0.8)
    changed = toy_run(tmp_path)
    override(changed, split_flags(["--optimizer.beta2", "0.9", "--optimizer.name", "Adam", "--optimizer.eps", "1e-7"]))
    assert changed.optimizer == Adam.Config(lr=1e-2, beta2=0.9, eps=1e-7)
    override(changed, split_flags(["--optimizer.name", "AdamW"]))
    assert changed.optimizer == AdamW.Config(lr=1e-2, beta2=0.9, eps=1e-7)
    with pytest.raises(UserError, match="^optimizer.name: expected AdamW or Adam, got SGD$"):
        override(changed, split_flags(["--optimizer.name", "SGD"]))
    of_another_version(tmp_path, older)
    assert goes_on(config) == 2
    with pytest.raises(UserError, match="optimizer.class core.optim.adam:AdamW -> core.optim.adam:Adam\n"):
        adam.build()


def test_a_setting_that_is_no_more_is_told(tmp_path: Path) -> None:
    config = saved(tmp_path)
    of_another_version(tmp_path, lambda stated: stated["optimizer"].update(gamma=0.5))
    with pytest.raises(UserError, match=r"optimizer.gamma 0.5 -> \(not known\)"):
        config.build()


def test_that_settings_may_change_is_not_recorded(tmp_path: Path) -> None:
    config = saved(tmp_path)
    config.training.steps, config.checkpoint.allow_config_change = 4, True
    assert run(config)["checkpoint"]["allow_config_change"] is False
    stated = json.loads((tmp_path / "run/checkpoint/step-4/config.json").read_text())
    assert stated["checkpoint"]["allow_config_change"] is False and config.checkpoint.allow_config_change


# Built from Python


def broken(folder: Path) -> Trainer.Config:
    config = toy_run(folder)
    config.lr_scheduler.decay_ratio = 7.0
    config.optimizer.lr = -1.0
    config.training.steps = 0
    config.debug.on_nonfinite = "never"
    config.parallelism.tensor_parallel_degree = 3
    return config


BROKEN = [
    "debug.on_nonfinite: expected 'stop' or 'skip', got 'never'",
    "training.steps: steps 0 must be at least 1",
    "optimizer.lr: lr -1.0 must be a finite number, not negative",
    "lr_scheduler.decay_ratio: decay_ratio 7.0 must be between 0 and 1",
]


def test_a_run_is_validated_by_whoever_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "process_group", lambda *_: pytest.fail("a process group was made"))
    monkeypatch.setattr(trainer_module, "converted_model", lambda *_: pytest.fail("a model was made"))
    for build in (lambda c: c.build(), Trainer, lambda c: Trainer.plan(c, world_size=1, rank=0)):
        with pytest.raises(UserError) as caught:
            build(broken(tmp_path))
        assert str(caught.value).splitlines() == BROKEN
    config = broken(tmp_path)
    config.training.steps = 4  # sizes make sense, so that ranks are counted too
    with pytest.raises(UserError) as caught:
        config.build()
    lines = str(caught.value).splitlines()
    assert set(BROKEN) - {BROKEN[1]} < set(lines) and any("tensor_parallel_degree 3" in line for line in lines)
    assert not (tmp_path / "run").exists()


def test_what_a_package_calls_validates_too(tmp_path: Path) -> None:
    config = Generation.Config(model=toy_run(tmp_path).model, tokenizer=Tokenizer.Config(), temperature=-1.0)
    with pytest.raises(UserError, match="temperature -1.0 must be finite"):
        config.build()


def test_building_changes_no_configuration(tmp_path: Path) -> None:
    config = toy_run(tmp_path, steps=1)
    before = to_json(config)
    trainer = config.build()
    trainer.config.training.steps = 77
    trainer.exit.close()
    assert to_json(config) == before


def test_a_pattern_that_fits_nothing_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    config = toy_run(tmp_path)
    config.optimizer.no_decay = ["a", "*.attention_norm.weight"]
    config.activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns = ["moe.router.gate", "attention.wqq"]
    with pytest.raises(UserError) as caught:
        config.build()
    lines = str(caught.value).splitlines()
    assert "no module has attention.wqq in its name; there is attention.wq, " in lines[0]
    assert lines[1].startswith("optimizer.no_decay: no weight is called a; ") and len(lines) == 2
    assert not (tmp_path / "run").exists()


def test_tokens_that_a_tokenizer_lacks_are_counted_at_the_head(tmp_path: Path) -> None:
    config = toy_run(tmp_path)
    trainer = config.build()
    assert "\ntokenizer  SentencePiece, 2,048 tokens (bundled)\n" in trainer.summary()
    trainer.exit.close()
    config.model.vocab_size, config.dump_folder = 3000, str(tmp_path / "padded")
    trainer = config.build()
    head = "SentencePiece, 2,048 tokens (bundled); 952 of model.vocab_size 3,000 unused device"
    assert head in " ".join(trainer.summary().split())
    trainer.exit.close()


def test_what_is_compiled_is_told_at_the_head(tmp_path: Path) -> None:
    cpu, loss = torch.device("cpu"), CrossEntropy.Config()
    left = "cross-entropy as it is, which a CPU computes faster"
    assert compiled(Compile(), loss, cpu) == ""
    assert compiled(Compile(enable=True), loss, cpu) == f"every block, by inductor; {left}"
    assert compiled(Compile(enable=True, components=["loss"]), loss, cpu) == left
    assert compiled(Compile(enable=True, components=["model"]), loss, cpu) == "every block, by inductor"
    assert compiled(Compile(enable=True), loss, torch.device("cuda")) == "every block and the loss, by inductor"
    config = toy_run(tmp_path)
    config.compile = Compile(enable=True, backend="eager", components=["model"])
    trainer = config.build()
    assert "\ncompiled   every block, by eager\nsteps " in trainer.summary()
    trainer.exit.close()


def debug() -> Trainer.Config:
    """A run of another toy than the one whose weights are there."""
    config = toy_run(Path())
    config.optimizer.lr = 3e-3
    return config


def toy_configs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The recipes of a package: `debug` alone."""
    configs = ModuleType("toy_package.configs")
    monkeypatch.setattr(debug, "__module__", configs.__name__)
    configs.debug = debug
    return configs


def test_a_model_that_was_converted_trains_and_its_weights_are_read_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = toy_configs(monkeypatch)
    ours = Toy.Config(n_layers=3, vocab_size=2048)
    save_weights(on_cpu(ours, seed=5), "converted")
    source = str(tmp_path / "converted/config.json")
    begun = {}
    asked = ["--checkpoint.enable", "--checkpoint.initial_load_path", "converted"]
    for name, options in {"new": [], "theirs": asked}.items():
        main(configs, ["--config", source, "--training.steps", "1", "--dump_folder", name, *options])
        begun[name] = json.loads(Path(name, "metrics.jsonl").read_text().splitlines()[0])["loss"]
        stated = json.loads(Path(name, "config.json").read_text())
        assert stated["model"]["n_layers"] == 3 and stated["optimizer"]["lr"] == 3e-3 and stated["recipe"] == "debug"
        said = capsys.readouterr().err
        assert f"{source} describes the model alone: all else is as in recipe debug" in said
        assert f"--checkpoint.enable --checkpoint.initial_load_path {tmp_path}/converted" in said
    assert begun["new"] != begun["theirs"]


@pytest.mark.parametrize("kind", ["theirs", "ours", "run"])
def test_the_folder_decides_the_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--model.from takes the sizes from a folder of any kind, and the settings of the command line go before it."""
    monkeypatch.chdir(tmp_path)
    configs = toy_configs(monkeypatch)
    folder, model = tmp_path / kind, on_cpu(Toy.Config(n_layers=3, vocab_size=2048, norm_eps=1e-4), seed=5)
    {"theirs": save_hf, "ours": save_weights, "run": save_weights}[kind](model, folder)
    if kind == "run":
        config = debug()
        config.model, config.optimizer.lr = model.config, 1.0
        (folder / "config.json").write_text(to_json(config))
    words = ["--config", "debug", "--model.from", str(folder), "--model.max_seq_len", "32"]
    main(configs, [*words, "--print-config"])
    stated = json.loads(capsys.readouterr().out)
    assert stated["optimizer"]["lr"] == 3e-3 and stated["recipe"] == "debug"
    model.config.max_seq_len = 32
    assert from_dict(stated["model"], Decoder.Config) == model.config
    if kind == "theirs":
        begin = ["--checkpoint.enable", "--checkpoint.initial_load_path", kind, "--training.steps", "1"]
        main(configs, [*words, *begin, "--optimizer.lr", "0", "--dump_folder", "begun"])
        load_folder(left := on_cpu(model.config), tmp_path / "begun")
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in left.state_dict().items())
        for change in ([], ["--checkpoint.allow_model_change"]):
            with pytest.raises(SystemExit):
                main(configs, ["--config", "debug", *begin, *change, "--dump_folder", "refused"])
            said = capsys.readouterr().err
            assert ("does not fit" if change else "norm_eps 0.0001, not 1e-06") in said


def test_a_folder_that_decides_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = toy_configs(monkeypatch)
    file = tmp_path / "config.json"
    for data, said in {
        "{}": f"{file} describes no model: it states neither a class nor a model_type",
        '{"model_type": "llama"}': f"{file}: this config.json is not one of toy: model_type is 'llama', not 'toy'",
        '{"class": "core.optim.adam:AdamW", "lr": 1.0}': "which stands at optimizer, not at model",
    }.items():
        file.write_text(data)
        with pytest.raises(SystemExit):
            main(configs, ["--config", "debug", "--model.from", str(tmp_path), "--print-config"])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(configs, ["--model.from", str(tmp_path)])
    assert "choose a recipe: --config NAME beside --model.from" in capsys.readouterr().err
