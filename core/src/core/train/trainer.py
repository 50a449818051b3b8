"""The beam: assembles a run from its configuration, and loops."""

import gc
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from core.activation_checkpoint.apply import ActivationCheckpoint, check_names
from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.record import to_dict, to_json
from core.data.loader import DataLoader
from core.data.packing import Batch
from core.data.tokenizer import Tokenizer
from core.nn.balance import force_balance, load_metrics
from core.nn.decoder import Decoder
from core.nn.init import init_weights, materialise
from core.nn.module import parameter_count, training_flops_per_token, weights
from core.optim.optimizer import Optimizer
from core.optim.schedule import Schedule
from core.runtime.device import GIB, describe, peak_flops, peak_memory, select_device
from core.runtime.log import start_logging
from core.runtime.seed import seed_everything
from core.runtime.signals import StopRequest
from core.train.folder import check_run_folder, make_run_folder
from core.train.loss import cross_entropy
from core.train.memory import check_memory, estimate, memory_advice
from core.train.metrics import Metrics, Record, console_line
from core.train.profile import Profiler
from core.train.settings import Compile, Debug, Training
from core.train.step import Objective, StepInfo, train_step
from core.train.validate import Validator

log = logging.getLogger("armature")


class Trainer(Configurable):
    """One training run: everything is checked and built at construction, `run` trains."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        recipe: str = ""
        """Name of the recipe that this configuration came from."""
        dump_folder: str | None = None
        """The run's folder, new for each run; without it outputs/<recipe>-<time>."""
        model: Decoder.Config
        """The model and its sizes."""
        tokenizer: Tokenizer.Config = field(default_factory=Tokenizer.Config)
        """How text becomes token ids."""
        dataloader: DataLoader.Config = field(default_factory=DataLoader.Config)
        """What is read, and in which order."""
        training: Training = field(default_factory=Training)
        """How long, how much at once, in which precision."""
        optimizer: Optimizer.Config = field(default_factory=Optimizer.Config)
        """How weights are updated."""
        lr_scheduler: Schedule.Config = field(default_factory=Schedule.Config)
        """How the learning rate changes over the run."""
        validator: Validator.Config = field(default_factory=Validator.Config)
        """The loss on held-out text."""
        metrics: Metrics.Config = field(default_factory=Metrics.Config)
        """What is reported, and where."""
        profiling: Profiler.Config = field(default_factory=Profiler.Config)
        """Traces of single steps."""
        activation_checkpoint: ActivationCheckpoint.Config = field(default_factory=ActivationCheckpoint.Config)
        """What backward keeps, and what it computes again."""
        compile: Compile = field(default_factory=Compile)
        """torch.compile."""
        debug: Debug = field(default_factory=Debug)
        """Seeds, determinism, and what to do when numbers break."""

        def problems(self) -> Iterator[tuple[str, str]]:
            compiled = self.compile.enable and "model" in self.compile.components
            if self.activation_checkpoint.mode == "memory_budget" and not compiled:
                yield (
                    "activation_checkpoint.mode",
                    "memory_budget is torch.compile's choice: add --compile.enable with model in compile.components, "
                    "or use selective",
                )
            if self.training.seq_len > self.model.max_seq_len:
                yield (
                    "training.seq_len",
                    f"seq_len {self.training.seq_len} exceeds model.max_seq_len {self.model.max_seq_len}: "
                    "shorten the rows or raise the model's limit",
                )
            if self.validator.enable and self.dataloader.validation_fraction == 0:
                yield (
                    "dataloader.validation_fraction",
                    "validation_fraction 0 holds nothing out for the validator: raise it, or --validator.no-enable",
                )

    def __init__(self, config: Config) -> None:
        start_logging()
        self.config = config
        check_one_process()
        check_run_folder(config.dump_folder)
        self.device = select_device(config.training.device)
        seed_everything(config.debug.seed, deterministic=config.debug.deterministic)
        self.tokenizer = config.tokenizer.build()
        check_vocabulary(self.tokenizer, config.model.vocab_size)
        with torch.device("meta"):
            self.model: Decoder = config.model.build()
        for block in self.model.layers.values():
            block.attention.kernel.check_trains_on(self.device)
        if config.debug.moe_force_load_balance:
            force_balance(self.model)
        check_names(config.activation_checkpoint, self.model)
        check_memory(estimate(self.model, config.model.vocab_size, config.training), self.device, config.training)
        self.loader = self._load("train")
        self.last_step = last_step(config.training, self.loader)
        self.flops_per_token = training_flops_per_token(self.model, config.training.seq_len)
        self.folder = make_run_folder(config.dump_folder, config.recipe)
        self._start_model()
        self.metrics = config.metrics.build(folder=self.folder, settings=to_dict(config))

    def _load(self, split: str) -> DataLoader:
        training = self.config.training
        return self.config.dataloader.build(
            tokenizer=self.tokenizer, seq_len=training.seq_len, seed=self.config.debug.seed, split=split
        )

    def _start_model(self) -> None:
        c = self.config
        materialise(self.model, self.device, getattr(torch, c.training.dtype))
        init_weights(((w.name, w.value, w.start) for w in weights(self.model)), c.debug.seed)
        self.optimizer = c.optimizer.build(weights=self.model.named_parameters())
        self.schedule = c.lr_scheduler.build(steps=self.last_step)
        self.compute_dtype = c.training.compute_dtype(self.device)
        self.checkpointing = c.activation_checkpoint.build(folder=self.folder)
        self.checkpointing.apply(self.model)
        loss = cross_entropy
        if c.compile.enable and "model" in c.compile.components:
            for block in self.model.layers.values():
                block.compile(backend=c.compile.backend, fullgraph=True)
        if c.compile.enable and "loss" in c.compile.components:
            loss = torch.compile(cross_entropy, backend=c.compile.backend)
        self.objective = Objective(self.model, loss, device=self.device, dtype=self.compute_dtype, mask=c.training.mask)
        self.validator = None
        if c.validator.enable:
            self.validator = c.validator.build(
                loader=self._load("validation"), objective=self.objective, batch_size=c.training.local_batch_size
            )

    def summary(self) -> str:
        """What will be trained, on what, where, and what is written: the head of a run on the console."""
        c, flops = self.config, self.flops_per_token
        training = c.training
        dtype = str(self.compute_dtype).removeprefix("torch.")
        optional = {
            c.metrics.save_tb_folder: c.metrics.enable_tensorboard,
            c.profiling.save_traces_folder: c.profiling.enable_profiling,
        }
        files = ["config.json", "metrics.jsonl", *(name for name, chosen in optional.items() if chosen)]
        rows = {
            "model": f"{type(self.model).__name__} ({c.recipe or 'no recipe'})",
            "parameters": f"{parameter_count(self.model):,}",
            "FLOPs/token": f"{flops.total:,} ({flops.attention / flops.total:.0%} in attention)",
            "data": self.loader.description,
            "tokenizer": self.tokenizer.description,
            "device": f"{describe(self.device)}; weights {training.dtype}, compute {dtype}",
            "backward": f"activation checkpoint {c.activation_checkpoint.mode}",
            "steps": f"{self.last_step:,} of {training.rows_per_step} x {training.seq_len:,} tokens",
            "written to": f"{self.folder} ({', '.join(files)})",
        }
        return "\n".join(f"{name:<12} {value}" for name, value in rows.items())

    def run(self) -> None:
        """Train to the last step, or to the end of the step in which SIGINT or SIGTERM arrives."""
        log.info(self.summary())
        if self.last_step < self.config.training.steps:
            log.info(f"the data last for {self.last_step:,} of {self.config.training.steps:,} steps")
        (self.folder / "config.json").write_text(to_json(self.config))
        anomalies = torch.autograd.set_detect_anomaly(self.config.debug.detect_anomaly)
        profiler = self.config.profiling.build(folder=self.folder)
        advice = memory_advice(self.device, self.config.training, self.config.activation_checkpoint.mode)
        with StopRequest() as stop, collected_garbage(), anomalies, profiler, self.metrics, advice:
            step = self._loop(stop, profiler)
        kept = f"kept in {self.folder}: config.json and metrics.jsonl (weights are not saved)"
        if stop.signal is not None:
            log.info(f"stopped by {stop.signal.name} after step {step} of {self.last_step}; {kept}")
        else:
            log.info(f"finished {step:,} steps; {kept}")

    def _loop(self, stop: StopRequest, profiler: Profiler) -> int:
        """Steps until the last or until `stop`; gives the number of the last one."""
        c = self.config
        step = since = 0
        mark = time.perf_counter()
        while step < self.last_step and not stop:
            step += 1
            if step % c.training.gc_freq == 0:
                gc.collect(1)
            info = self.step(step)
            profiler.step()
            if step == 1:
                self.checkpointing.report()
            validates = self.validator is not None and self.validator.due(step, self.last_step)
            if self.metrics.due(step, self.last_step) or validates or stop:
                step_time_s = (time.perf_counter() - mark) / (step - since)
                self._report(step, info, step_time_s, self._validate(stop) if validates else None)
                mark, since = time.perf_counter(), step
        return step

    def step(self, step: int) -> StepInfo:
        """Train step number `step`, counted from 1."""
        c = self.config
        info = train_step(
            self.objective,
            self.optimizer,
            self.batches(step),
            step=step,
            lr=c.optimizer.lr * self.schedule.factor(step),
            max_norm=c.training.max_norm,
            on_nonfinite=c.debug.on_nonfinite,
        )
        if not info.updated:
            log.warning(f"step {step} left out: loss {info.loss}, gradient norm {info.grad_norm}")
        return info

    def batches(self, step: int) -> list[Batch]:
        """The microbatches of `step`, counted from 1: rows are numbered over the whole run."""
        training = self.config.training
        first = (step - 1) * training.rows_per_step
        starts = range(first, first + training.rows_per_step, training.local_batch_size)
        return [self.loader.read(start, training.local_batch_size) for start in starts]

    def _validate(self, stop: StopRequest) -> float | None:
        assert self.validator is not None
        return self.validator.loss(lambda: bool(stop))

    def _report(self, step: int, info: StepInfo, step_time_s: float, validation_loss: float | None) -> None:
        tokens_per_step = self.config.training.rows_per_step * self.config.training.seq_len
        tokens_per_second = tokens_per_step / step_time_s
        peak = peak_flops(self.device)
        record = Record(
            step=step,
            loss=info.loss,
            grad_norm=info.grad_norm,
            lr=self.config.optimizer.lr * self.schedule.factor(step),
            tokens=step * tokens_per_step,
            tokens_per_second=tokens_per_second,
            step_time_s=step_time_s,
            memory_gib=peak_memory(self.device) / GIB,
            mfu=None if peak is None else self.flops_per_token.total * tokens_per_second / peak,
            validation_loss=validation_loss,
            experts=dict(load_metrics(self.model)),
        )
        self.metrics.write(record)
        log.info(console_line(record, self.last_step, (self.last_step - step) * step_time_s))


def check_one_process() -> None:
    """Raise `UserError` when a launcher started more than one process."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise UserError(
            f"WORLD_SIZE is {world_size}, and this version trains in one process: start it without torchrun"
        )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise `UserError` when the tokenizer makes ids that the model has no row for."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, model.vocab_size is {vocab_size:,}: "
            f"set --model.vocab_size {tokenizer.vocab_size} or choose another tokenizer"
        )


def last_step(training: Training, loader: DataLoader) -> int:
    """Steps that the run has data for, at most `training.steps`."""
    if loader.n_samples is None:
        return training.steps
    steps = min(training.steps, loader.n_samples // training.rows_per_step)
    if steps == 0:
        raise UserError(
            f"the data have {loader.n_samples} rows of {training.seq_len} tokens, one step takes "
            f"{training.rows_per_step}: lower the batch size or training.seq_len, or give more text or epochs"
        )
    return steps


@contextmanager
def collected_garbage() -> Iterator[None]:
    """Python's cycle collector stands still while the block runs: the loop calls it at its own moments."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
