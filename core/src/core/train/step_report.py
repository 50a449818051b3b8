"""What a run reports of a step: a record in its metrics, and a line on the console."""

import logging
from collections.abc import Callable, Sequence
from functools import partial

from core.config.errors import UserError
from core.nn.decoder import Decoder
from core.nn.module import Flops
from core.optim.schedule import Schedule
from core.parallel.layout import RankView
from core.runtime.device import GIB, peak_flops, peak_memory
from core.runtime.live import RunProgress
from core.runtime.units import clock, rate, size_text
from core.step.assemble import expert_loads
from core.step.checks import Run
from core.step.rows_ahead import RowsAhead
from core.step.update import StepInfo
from core.train.checkpoints import RunCheckpoints
from core.train.layer_numbers import LayerNumbers
from core.train.metrics import Metrics, Record
from core.train.observers import Observers
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
        layout: RankView,
        checkpoints: RunCheckpoints,
        schedule: Schedule,
        metrics: Metrics,
        observers: Observers,
        rows: RowsAhead,
    ) -> None:
        self.run, self.layout, self.checkpoints, self.schedule = run, layout, checkpoints, schedule
        self.metrics, self.models, self.flops_per_token = metrics, list(models), flops_per_token
        self.last_step, self.observers, self.rows = last_step, observers, rows
        self._reported = checkpoints.start.step, checkpoints.start.tokens
        self._layers = LayerNumbers(models, layout, activations=run.compile.shows_blocks())
        self._of_layers: dict[str, float] = {}
        self.last: Record | None = None
        """What was reported last."""

    def measured(self, step: int, take: Callable[[int], StepInfo]) -> StepInfo:
        """What `take` returns for a step, which is measured layer by layer where the settings ask for that."""
        freq = self.metrics.config.per_layer_freq
        if freq is None or step % freq:
            return take(step)
        info, self._of_layers = self._layers.measured(partial(take, step))
        return info

    def __call__(self, step: int, info: StepInfo, step_time_s: float, validation: Validation | None) -> None:
        """Report what a step did, of which those since the last report took `step_time_s` each. Every rank must call
        it."""
        model, device = self.run.model, self.layout.device
        tokens, (before, tokens_before) = self.checkpoints.progress(step).tokens, self._reported
        tokens_per_second = (tokens - tokens_before) / (step - before) / step_time_s
        self._reported = step, tokens
        peak = peak_flops(device)
        self.last = record = Record(
            step=step,
            loss=info.loss,
            mtp_loss=(info.total_loss - info.loss) / model.mtp_loss_weight if model.n_mtp_layers else None,
            grad_norm=info.grad_norm,
            lr=self.run.optimizer.lr * self.schedule.factor(step),
            tokens=tokens,
            tokens_per_second=tokens_per_second,
            step_time_s=step_time_s,
            data_wait_s=self.rows.take_wait_s(),
            memory_gib=peak_memory(device) / GIB,
            mfu=None
            if peak is None
            else self.flops_per_token.total * tokens_per_second / peak / self.checkpoints.ranks.size,
            validation_loss=None if validation is None else validation.loss,
            validation_bits_per_byte=None if validation is None else validation.bits_per_byte,
            numbers=self._numbers(info, validation),
        )
        self.metrics.write(record)
        remaining_s = (self.last_step - step) * step_time_s
        fields = console_fields(record, self.last_step, remaining_s, accelerated=device.type != "cpu")
        fields += [f"{name} {value:.4g}" for name, value in record.numbers.items() if self.observers.on_console(name)]
        shown = [fields[1], fields[3], size_text(record.memory_gib * GIB)]
        progress = RunProgress(step, self.last_step, remaining_s, shown)
        log.info("  ".join(fields), extra={"fields": fields, "progress": progress})

    def _numbers(self, info: StepInfo, validation: Validation | None) -> dict[str, float]:
        """The loads of the experts, further learning rates and norms, steps left out, tokens and losses by source,
        validation losses by name, and what observers returned."""
        factor, numbers = self.schedule.factor(info.step), self.observers.take()
        own, self._of_layers = self._of_layers, {}
        own |= expert_loads(self.models, self.layout)
        own |= {name: peak * factor for name, peak in self.run.optimizer.further_lrs().items()}
        own |= {f"grad_norm/{pattern}": norm for pattern, norm in info.group_norms.items()}
        if skipped := self.checkpoints.spikes.skipped:
            own["skipped_steps"] = skipped
        loader, rows = self.checkpoints.loader, self.checkpoints.progress(info.step).rows
        own |= {f"data/{name}/tokens": float(n) for name, n in loader.tokens_by_source(rows).items()}
        own |= {f"data/{name}/epochs": n for name, n in loader.epochs_by_source(rows).items()}
        losses = self.rows.source_losses.take(self.layout)
        own |= {f"data/{name}/loss": loss for name, loss in losses.items()}
        own |= {f"validation/{name}/loss": loss for name, loss in (validation.by_name if validation else {}).items()}
        if both := sorted(own.keys() & numbers.keys()):
            raise UserError(f"an observer returned the number {both[0]}, which the record has by itself: rename it")
        return own | numbers


def console_fields(record: Record, last_step: int, remaining_s: float, *, accelerated: bool) -> list[str]:
    """What a step's line on the console says, with the time left: what one looks at while a run goes on, in 60 columns
    for a run of some minutes. All else is in metrics.jsonl.

    The memory and the use of a device are said of an accelerator; that of a process on a CPU hardly changes."""
    small = 0 < record.grad_norm < 0.1
    fields = [
        f"step {record.step:>{len(str(last_step))}}/{last_step}",
        f"loss {record.loss:.4f}",
        f"grad {record.grad_norm:.1e}" if small else f"grad {record.grad_norm:.2f}",
        f"{rate(record.tokens_per_second)} tok/s",
        f"eta {clock(remaining_s)}",
    ]
    if accelerated:
        fields.append(size_text(record.memory_gib * GIB))
    if record.mfu is not None:
        fields.append(f"mfu {record.mfu:.1%}")
    if record.validation_loss is not None:
        fields.append(f"validation loss {record.validation_loss:.4f}")
    if record.validation_bits_per_byte is not None:
        fields.append(f"{record.validation_bits_per_byte:.3f} bits/byte")
    return fields
