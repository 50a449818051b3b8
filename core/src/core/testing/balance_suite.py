"""What every model with experts must pass beside `core.testing.model_suite`."""

from pathlib import Path

import pytest

from core.config.cli import override, split_flags
from core.config.errors import UserError
from core.nn.balance import routers
from core.step.checks import expert_parts
from core.testing.resume_suite import ResumeSuite
from core.weights.convert import main as convert


class BalanceSuite(ResumeSuite):
    """The tests of a model with experts."""

    def test_choices_can_be_biased(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The option moves every router's bias once, by 0.01 up, down or not at all, in a step of two microbatches,
        checkpointed, and a validation. What Hugging Face has no name for is not lost in an export: that is refused."""
        run = self.interrupted(tmp_path / "run")
        has_a_name = all(part.router.load_balance_coeff for part in expert_parts(run.model))
        run.training.steps = run.validator.freq = run.lr_scheduler.warmup_steps = 1
        run.activation_checkpoint.mode = "full"
        override(run, split_flags(["--model.moe.router.load_balance_coeff", "0.01"]))
        trainer = run.build()
        trainer.run()
        (model,) = trainer.built.models
        assert routers(model)
        for router in routers(model).values():
            assert router.tokens_E.sum() == 4 * 64 * router.config.top_k and router.selection_bias is not None
            moves = router.selection_bias / 0.01
            steps = {round(move, 4) for move in (moves - moves.min()).tolist()}
            assert steps in ({0.0, 2.0}, {0.0, 1.0, 2.0}), steps
            assert router.selection_bias.sum().abs() < 1e-6
        if has_a_name:
            return
        with pytest.raises(SystemExit):
            convert({"any": type(model)}, ["to-hf", str(tmp_path / "run"), str(tmp_path / "hf")])
        assert "moe.router.load_balance_coeff is 0.01, there always None" in capsys.readouterr().err
        assert not (tmp_path / "hf").exists()
        run.dump_folder = str(tmp_path / "other")
        run.checkpoint.last_save_model_only = run.checkpoint.last_save_in_hf = True
        with pytest.raises(UserError, match="moe.router.load_balance_coeff is 0.01"):
            run.build()
