"""What `convert` and `generate` of every package must do; part of `core.testing.model_suite`.

Letters: B rows, L length, V vocabulary.
"""

import os
import runpy
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import core
from core.config.recipe import recipes
from core.generate.cache import CachedDecoder
from core.nn.decoder import Decoder
from core.step.update import StepInfo
from core.testing.key_suite import KeySuite
from core.testing.toy import on_cpu, randomise
from core.train.trainer import Trainer
from core.weights.hf import save_hf


class CommandSuite(KeySuite):
    """The tests of the commands beside training."""

    configs: ClassVar[ModuleType]
    """The module of the recipes."""
    debug: ClassVar[str]
    """Name of the recipe that trains on a laptop."""
    run_config: Callable[[str], Trainer.Config]
    """The run that a recipe describes; `ResumeSuite` has it."""
    interrupted: Callable[[Path], Trainer.Config]
    """A small run of the model in a folder; `ResumeSuite` has it."""

    @torch.no_grad()
    def test_kept_keys_give_the_logits_of_the_whole_forward(self, tiny: str) -> None:
        """Three prompts of other lengths in one batch, then pieces of one token and of several, to within 1e-5."""
        config = self.tiny_config(tiny)
        model, n_pads = on_cpu(config).eval(), [0, 9, 4]
        randomise(model, seed=8)
        tokens_BL = torch.randint(config.vocab_size, (3, 30), generator=torch.Generator().manual_seed(1))
        alone = [logits_of(model, row_L[None, n:])[0] for row_L, n in zip(tokens_BL, n_pads, strict=True)]
        end = 0
        with CachedDecoder(model, n_pads=n_pads, capacity=30) as cached:
            for piece_BL in tokens_BL.split([12, 1, 1, 1, 5, 1, 1, 8], dim=1):
                end += piece_BL.shape[1]
                expected_BV = torch.stack([row_LV[end - n - 1] for row_LV, n in zip(alone, n_pads, strict=True)])
                assert expected_BV.std() > 0.1
                torch.testing.assert_close(cached(piece_BL), expected_BV, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("command", ["train", "convert", "generate", "evaluate"])
    def test_a_command_tells_its_version_and_completes(
        self, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Every command answers --version, and knows for a shell what one may write behind it."""
        package, _, module = self.decoder.__module__.partition(".")
        if not module:
            pytest.skip("a model in one file has no commands")
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec(f"{package}.{command}", None))

        def call(*words: str) -> str:
            monkeypatch.setattr(sys, "argv", [command, *words])
            with suppress(SystemExit):
                runpy.run_module(f"{package}.{command}", run_name="__main__")
            return capsys.readouterr().out

        version = import_module(package).__version__
        assert [version, core.__version__] == [line.split()[1] for line in call("--version").splitlines()[:2]]
        first = "from-hf to-hf" if command == "convert" else " ".join(recipes(self.configs))
        assert f"\n_armature_of_{package}_{command}()" in (script := call("--print-completion", "zsh"))
        assert f" values='{first}" in script

    def test_commands_of_the_package(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """`convert` knows every kind of model that the package has, and `generate` writes the likeliest text, from a
        folder of Hugging Face and from what was made of it."""
        package = self.package()

        def call(command: str, *words: str | Path) -> str:
            monkeypatch.setattr(sys, "argv", [command, *map(str, words)])
            runpy.run_module(f"{package}.{command}", run_name="__main__")
            return capsys.readouterr().out

        kinds = {config.model_type: self.tiny_config(name) for name, config in self.hf_configs.items()}
        run = self.run_config(self.debug)
        models = {name: on_cpu(config) for name, config in {**kinds, "debug": run.model}.items()}
        for kind, model in models.items():
            randomise(model, seed=9)
            save_hf(model, tmp_path / kind)
            call("convert", "from-hf", tmp_path / kind, tmp_path / f"{kind} of ours")
        tokenizer, prompt = run.tokenizer.build(), "The tensors of"
        begin = tokenizer.encode_documents([prompt])[0][:-1]
        ids = likeliest(models["debug"].eval(), begin, n_tokens=tokenizer.vocab_size, end=tokenizer.eos_id)
        expected = tokenizer.decode(ids).removeprefix(prompt) + "\n"
        for folder in (tmp_path / "debug", tmp_path / "debug of ours"):
            words = ["--config", self.debug, "--checkpoint", folder, "--prompt", prompt, "--temperature", "0"]
            assert call("generate", *words, "--max-new-tokens", "12", "--device", "cpu") == expected

    def test_commands_that_the_end_of_a_run_prints_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Each is called as it is printed, at a stop and at the end; the folder that was exported tells itself which
        model it has."""
        package, run = self.package(), self.interrupted(tmp_path / "a run")
        run.checkpoint.interval = 500
        trainer = run.build()
        step = trainer.step

        def stopped_at(number: int) -> StepInfo:
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(number)

        monkeypatch.setattr(trainer, "step", stopped_at)
        trainer.run()

        def call(program: str, option: str, module: str, *words: str) -> str:
            assert (program, option) == ("python", "-m")
            monkeypatch.setattr(sys, "argv", [module, *words])
            runpy.run_module(module, run_name="__main__")
            return capsys.readouterr().out

        printed = commands_in(capsys.readouterr().out)
        look = "look at it, in a page for a browser"
        assert list(printed) == [look, "write text", "go on", "export to a Hugging Face folder"]
        printed = commands_in(call(*printed["go on"]))
        assert list(printed) == [look, "write text", "go on, to step 8", "export to a Hugging Face folder"]
        exported = Path(printed["export to a Hugging Face folder"][-1])
        printed["and again"] = ["python", "-m", f"{package}.generate", "--checkpoint", str(exported), "--prompt", "the"]
        assert all(call(*words).strip() for words in printed.values())
        assert (tmp_path / "a run/checkpoint/step-8").is_dir() and (exported / "config.json").is_file()

    def package(self) -> str:
        """The package that the model is from."""
        package, _, module = self.decoder.__module__.partition(".")
        if not module:
            pytest.skip("a model in one file has no commands")
        return package


def commands_in(text: str) -> dict[str, list[str]]:
    """The words of the commands in what a run printed, by the purpose in the comment above each."""
    lines = text.replace("\\\n", "").splitlines()
    return {
        line.removeprefix("# "): shlex.split(below)
        for line, below in zip(lines, lines[1:], strict=False)
        if line.startswith("# ")
    }


def logits_of(model: Decoder, tokens_BL: Tensor) -> Tensor:
    """The logits (B, L, V) of a whole forward."""
    logits_BLV = model(tokens_BL)
    assert isinstance(logits_BLV, Tensor)
    return logits_BLV


@torch.no_grad()
def likeliest(model: Decoder, ids: list[int], *, n_tokens: int, end: int | None) -> list[int]:
    """A text continued by twelve of the likeliest tokens, each from a forward over all before it, or up to its end."""
    for _ in range(12):
        token = int(logits_of(model, torch.tensor([ids]))[0, -1, :n_tokens].argmax())
        if token == end:
            break
        ids = [*ids, token]
    return ids
