"""What a run reports of a step: a record in its metrics, and a line on the console."""

import logging
from collections.abc import Sequence

from core.nn.decoder import Decoder
from core.nn.module import Flops
from core.optim.schedule import Schedule
from core.parallel.layout import Layout
from core.runtime.device import GIB, peak_flops, peak_memory
from core.runtime.units import duration
from core.step.assemble import expert_loads
from core.step.checks import Run
from core.step.update import StepInfo
from core.train.checkpoints import Keeper
from core.train.metrics import Metrics, Record
from core.train.validate import Validation

log = logging.getLogger("armature")


class StepReport:
    """Reports steps of a run whose models, on this rank, are `models`."""

    def __init__(
        self,
        run: Run,
        models: Sequence[Decoder],
        flops_per_token: Flops,
        *,
        last_step: int,
        layout: Layout,
        keeper: Keeper,
        schedule: Schedule,
        metrics: Metrics,
    ) -> None:
        self.run, self.layout, self.keeper, self.schedule = run, layout, keeper, schedule
        self.metrics, self.models, self.flops_per_token = metrics, list(models), flops_per_token
        self.last_step = last_step
        self.last: Record | None = None
        """What was reported last."""

    def __call__(self, step: int, info: StepInfo, step_time_s: float, validation: Validation | None) -> None:
        """Report what a step did, of which those since the last report took `step_time_s` each. Every rank must call
        it."""
        model, device = self.run.model, self.layout.device
        tokens_per_second = self.keeper.n_rows * self.run.training.seq_len / step_time_s
        peak = peak_flops(device)
        self.last = record = Record(
            step=step,
            loss=info.loss,
            mtp_loss=(info.total_loss - info.loss) / model.mtp_loss_weight if model.n_mtp_layers else None,
            grad_norm=info.grad_norm,
            lr=self.run.optimizer.lr * self.schedule.factor(step),
            tokens=self.keeper.progress(step).tokens,
            tokens_per_second=tokens_per_second,
            step_time_s=step_time_s,
            memory_gib=peak_memory(device) / GIB,
            mfu=None
            if peak is None
            else self.flops_per_token.total * tokens_per_second / peak / self.keeper.ranks.size,
            validation_loss=None if validation is None else validation.loss,
            validation_bits_per_byte=None if validation is None else validation.bits_per_byte,
            experts=expert_loads(self.models, self.layout),
        )
        if self.layout.is_first:
            self.metrics.write(record)
        log.info(console_line(record, self.last_step, (self.last_step - step) * step_time_s))


def console_line(record: Record, last_step: int, remaining_s: float) -> str:
    """The record as one line for people, with the time left."""
    parts = [
        f"step {record.step:>{len(str(last_step))}}/{last_step}",
        f"loss {record.loss:.4f}",
        f"grad norm {record.grad_norm:.3f}",
        f"lr {record.lr:.2e}",
        f"{record.tokens_per_second:,.0f} tokens/s",
        f"{record.memory_gib:.2f} GiB",
    ]
    if record.mfu is not None:
        parts.append(f"mfu {record.mfu:.1%}")
    if record.validation_loss is not None:
        parts.append(f"validation loss {record.validation_loss:.4f}")
    return "  ".join([*parts, f"left {duration(remaining_s)}"])
