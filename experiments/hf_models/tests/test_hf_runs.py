"""Runs of models of transformers: resumed, exported, refused, planned."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from hf_families import EXPERTS, SIZES
from safetensors.torch import load_file

from core.checkpoint.settings import Checkpoint
from core.config import cli
from core.config.errors import UserError
from core.config.recipe import recipes
from core.config.record import from_json
from core.config.validate import validate
from core.data.tokenizer import bundled_model
from core.nn.init import materialise
from core.parallel.layout import SingleRank
from core.runtime.meta import meta_model
from hf_models import configs
from hf_models.configs import TINY
from hf_models.convert import export
from hf_models.folder import start_values
from hf_models.model import HFModel
from hf_models.trainer import HFTrainer, fill


def a_run(path: Path, folder: Path) -> HFTrainer.Config:
    """The debug run, short, of the model in a folder."""
    text = folder / "text.jsonl"
    if not text.exists():
        text.write_text("".join(json.dumps({"text": f"{n} green bottles on the wall. " * 4}) + "\n" for n in range(80)))
    config = configs.hf_models_debug()
    config.model = HFModel.Config(path=str(path), start="random" if path == TINY else "weights")
    config.dataloader.dataset, config.dataloader.cache_folder = str(text), str(folder / "cache")
    config.training.steps, config.training.seq_len, config.training.local_batch_size = 2, 32, 2
    config.training.device, config.metrics.log_freq = "cpu", 1
    config.validator.enable, config.metrics.per_layer_freq = False, 2
    config.lr_scheduler.warmup_steps, config.lr_scheduler.decay_ratio = 0, 0.0
    config.checkpoint = Checkpoint(enable=True)
    config.dump_folder = str(folder / "run")
    return config


def losses(folder: str | None) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(folder or "") / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_and_comes_out_as_a_folder_of_its_family(tmp_path: Path) -> None:
    stated = tf.OlmoeConfig(**(SIZES | {"vocab_size": 2048}), **EXPERTS)
    model = tf.AutoModelForCausalLM.from_config(stated)
    source = tmp_path / "source"
    model.save_pretrained(source)
    (source / "tokenizer.model").write_bytes(bundled_model())
    companions = {"LICENSE": "Do as you like.", "chat_template.jinja": "{{ messages[0]['content'] }}"}
    for name, text in companions.items():
        (source / name).write_text(text)
    whole, halves = (tmp_path / name for name in ("whole", "halves"))
    for folder in (whole, halves):
        folder.mkdir()
    config = a_run(source, whole)
    config.tokenizer.path = str(source)
    config.training.steps = 4
    trainer = config.build()
    trainer.run()
    config.dump_folder, config.training.steps = str(halves), 2
    config.build().run()
    again = from_json((halves / "config.json").read_text(), HFTrainer.Config)
    again.training.steps = 4
    again.build().run()
    assert losses(str(halves)) == losses(str(whole / "run")) and len(losses(str(halves))) == 4
    last = json.loads((halves / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"update_norm/layers.2", "update_norm/lm_head", "activation_rms/layers.0"} <= last.keys()
    exported, resumed = tmp_path / "exported", tmp_path / "resumed"
    export(whole / "run", exported)
    export(halves, resumed)
    was, now, other = (load_file(place / "model.safetensors") for place in (source, exported, resumed))
    assert {name: value.shape for name, value in was.items()} == {name: value.shape for name, value in now.items()}
    assert all(torch.equal(now[name], other[name]) for name in now)
    assert not torch.equal(now["lm_head.weight"], was["lm_head.weight"])
    assert {"tokenizer.model", "generation_config.json"} <= {file.name for file in exported.iterdir()}
    assert {name: (exported / name).read_text() for name in companions} == companions
    before, after = (json.loads((place / "config.json").read_text()) for place in (source, exported))
    assert {key: after[key] for key in before if "token_id" not in key} == {
        k: v for k, v in before.items() if "token_id" not in k
    }
    theirs, (trained,) = tf.AutoModelForCausalLM.from_pretrained(exported), trainer.built.models
    ours = meta_model(HFModel.Config(path=str(exported)))
    materialise(ours, torch.device("cpu"), torch.float32)
    fill(ours, start_values(str(exported), "auto", "weights", 0), SingleRank(torch.device("cpu")))
    tokens_BL = torch.randint(0, 2048, (2, 16))
    assert torch.equal(theirs(tokens_BL).logits, ours(tokens_BL))
    assert torch.equal(theirs(tokens_BL).logits, trained.eval()(tokens_BL))


def problems(config: HFTrainer.Config) -> str:
    with pytest.raises(UserError) as error:
        config.build()
    return str(error.value)


def test_what_cannot_be_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = a_run(TINY, tmp_path)
    for degree in ("tensor", "context", "expert", "pipeline"):
        setattr(config.parallelism, f"{degree}_parallel_degree", 2)
    config.checkpoint.last_save_in_hf = config.checkpoint.last_save_model_only = True
    told = problems(config)
    for words in (
        "tensor_parallel_degree 2 with a model of transformers: it cuts weights by the names of their axes",
        "context_parallel_degree 2 with a model of transformers: attention",
        "expert_parallel_degree 2 with a model of transformers: experts",
        "pipeline_parallel_degree 2 with a model of transformers: models of transformers run from the embedding",
        "use python -m hf_models.convert",
    ):
        assert words in told
    folder = tmp_path / "folder"
    folder.mkdir()
    for stated, words in (
        (None, "has no config.json"),
        (
            {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "code.Mine"}},
            "code that it names (auto_map) is never run",
        ),
        ({"model_type": "lama"}, "no causal language model of type lama; did you mean"),
        ({"model_type": "llama", "quantization_config": {}}, "stores its weights in few bits"),
        ({"model_type": "olmoe", "output_router_logits": True}, "a loss of its routers"),
        ({"model_type": "xlnet"}, "tokens of xlnet see later ones"),
    ):
        if stated is not None:
            (folder / "config.json").write_text(json.dumps(stated))
        assert words in problems(a_run(folder, tmp_path))
    (folder / "config.json").write_text((TINY / "config.json").read_text())
    assert "has no weights (*.safetensors): --model.start random" in problems(a_run(folder, tmp_path))
    (folder / "tokenizer.model").write_bytes(bundled_model())
    assert f"add --tokenizer.path {folder}" in problems(a_run(folder, tmp_path))
    assert "path is empty: --model.path FOLDER" in problems(configs.hf_models())


def test_a_model_that_sees_ahead_is_refused(tmp_path: Path) -> None:
    for is_decoder in (False, True):
        path = tmp_path / str(is_decoder)
        tf.BertConfig(**SIZES, is_decoder=is_decoder).save_pretrained(path)
        found = list(HFModel.Config(path=str(path), start="random").problems())
        assert found == [] if is_decoder else "say is_decoder true in its config.json" in found[0][1]


def test_documents_of_a_row_run_into_each_other_by_recurrence(tmp_path: Path) -> None:
    tf.RecurrentGemmaConfig(**(SIZES | {"vocab_size": 2048}), head_dim=16, lru_width=64).save_pretrained(tmp_path)
    config = a_run(tmp_path, tmp_path)
    config.model.start = "random"
    config.training.mask = "document"
    assert "does not keep documents of a row apart: use --training.mask causal" in problems(config)


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    """Of a type that transformers knows: its own code is used in place of that which the folder names."""
    path, ran = tmp_path / "model", tmp_path / "ran"
    tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**(SIZES | {"vocab_size": 2048}))).save_pretrained(path)
    stated = json.loads((path / "config.json").read_text())
    stated["auto_map"] = {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}
    (path / "config.json").write_text(json.dumps(stated))
    (path / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    trainer = a_run(path, tmp_path).build()
    trainer.run()
    export(tmp_path / "run", tmp_path / "exported")
    assert type(trainer.built.models[0].theirs) is tf.LlamaForCausalLM and not ran.exists()
    assert "auto_map" not in json.loads((tmp_path / "exported/config.json").read_text())


def test_a_dry_run_plans_the_model_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(
        configs, ["--config", "hf_models_debug", "--dry-run", "--json", "--training.device", "cpu", "--world-size", "2"]
    )
    plan = json.loads(capsys.readouterr().out)
    n = sum(weight.numel() for weight in meta_model(HFModel.Config(path=str(TINY))).parameters())
    assert plan["model_parameters"] == n and plan["stages"] == ["0-3"]
    assert (
        plan["weights_bytes"] == plan["gradients_bytes"] == pytest.approx(2 * n, rel=0.01)
    )  # half of them, in 4 bytes
    assert {part["collective"] for part in plan["traffic"]} >= {"all-gather", "reduce-scatter"}


def test_recipes_are_valid_and_need_a_folder() -> None:
    assert recipes(configs).keys() == {"hf_models_debug", "hf_models"}
    validate(configs.hf_models_debug())
    assert isinstance(configs.hf_models(), HFTrainer.Config) and configs.hf_models().model.path == ""
