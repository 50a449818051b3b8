"""Assembles a run from its configuration, and loops."""

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from core.activation_checkpoint.apply import ActivationCheckpoint
from core.checkpoint.settings import Checkpoint
from core.comm.transport import release
from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.record import to_dict
from core.data.packing import Batch
from core.data.samples import Samples
from core.data.sampling import Split
from core.data.text import IndexedText
from core.data.text_bytes import TextBytes
from core.data.tokenizer import Tokenizer
from core.nn.balance import force_balance
from core.nn.decoder import Decoder
from core.nn.weights import parameter_count, training_flops_per_token
from core.optim.adam import AdamW
from core.optim.groups import freeze
from core.optim.optimizer import Optimizer
from core.optim.schedule import Schedule
from core.parallel.layout import Wrapping
from core.parallel.settings import Parallelism
from core.quantization.converter import Converter, converted_model
from core.runtime.agreement import check_agreement
from core.runtime.device import select_device
from core.runtime.distributed import Comm, lower_timeout, process_group
from core.runtime.garbage import collected_garbage
from core.runtime.launcher import World, find_world
from core.runtime.log import live_line, start_logging
from core.runtime.ranks import Ranks
from core.runtime.seed import seed_everything
from core.runtime.signals import StopRequest
from core.step.assemble import assemble, block_compiler, make_dispatcher, make_layout
from core.step.checks import check_model, check_run, compile_problems
from core.step.loss import CrossEntropy, Loss, loss_backend
from core.step.objective import Objective
from core.step.rows import open_samples
from core.step.rows_ahead import RowsAhead
from core.step.settings import Compile, Debug, Training
from core.step.update import StepInfo, train_step
from core.train.checkpoints import RunCheckpoints
from core.train.data_checks import check_vocabulary, data_problems, last_step
from core.train.exchange import Exchange
from core.train.folder import check_run_folder, config_text, make_run_folder, rank_files, resolved, write_config
from core.train.identity import run_facts, text_facts
from core.train.lock import FolderLock
from core.train.memory import check_memory, memory_advice
from core.train.metrics import Metrics
from core.train.observers import Observer, Observers
from core.train.outcome import Outcome, RunResult
from core.train.profile import Profiler
from core.train.step_report import StepReport
from core.train.summary import started, summary
from core.train.validate import Validator, ema_problems, held_out_sets

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
        dataloader: Samples.Config = field(default_factory=IndexedText.Config)
        """What is read, and in which order."""
        training: Training = field(default_factory=Training)
        """How long, how much at once, in which precision."""
        loss: Loss.Config = field(default_factory=CrossEntropy.Config)
        """What training lowers."""
        optimizer: Optimizer.Config = field(default_factory=AdamW.Config)
        """How weights are updated."""
        lr_scheduler: Schedule.Config = field(default_factory=Schedule.Config)
        """How the learning rate changes over the run."""
        validator: Validator.Config = field(default_factory=Validator.Config)
        """The loss on held-out text."""
        metrics: Metrics.Config = field(default_factory=Metrics.Config)
        """What is reported, and where."""
        observers: list[Observer.Config] = field(default_factory=list)
        """What looks at every step: numbers of one's own in the record, reasons to stop."""
        profiling: Profiler.Config = field(default_factory=Profiler.Config)
        """Traces of single steps."""
        parallelism: Parallelism = field(default_factory=Parallelism)
        """How ranks share the work."""
        comm: Comm = field(default_factory=Comm)
        """How long ranks wait for one another."""
        activation_checkpoint: ActivationCheckpoint.Config = field(default_factory=ActivationCheckpoint.Config)
        """What backward keeps, and what it computes again."""
        converters: list[Converter.Config] = field(default_factory=list)
        """What changes layers of the model before it has memory: low precision, adapters."""
        compile: Compile = field(default_factory=Compile)
        """torch.compile."""
        checkpoint: Checkpoint = field(default_factory=Checkpoint)
        """What is saved, and what the run goes on from."""
        debug: Debug = field(default_factory=Debug)
        """Seeds, determinism, and what to do when numbers break."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from compile_problems(self.compile, self.activation_checkpoint, self.parallelism)
            yield from ema_problems(self.validator, self.optimizer)
            yield from data_problems(self.training, self.model, self.dataloader, self.validator)

    def __init__(self, config: Config) -> None:
        self.config, c = config, config
        self.world = find_world() or World()
        start_logging(aloud=self.world.rank == 0)
        check_run(c, self.world.size)
        check_run_folder(c.dump_folder, c.checkpoint)
        self.device = select_device(c.training.device, self.world.local_rank)
        seed_everything(c.debug.seed, deterministic=c.debug.deterministic)
        self.tokenizer = c.tokenizer.build()
        check_vocabulary(self.tokenizer, c.model.vocab_size)
        (plain, _), (whole, self.conversions) = (converted_model(c.model, each) for each in ([], c.converters))
        check_model(whole, c, self.device)
        check_memory(whole, c, self.device, self.world)
        freeze(whole.named_parameters(), c.optimizer.groups)
        self.flops_per_token = training_flops_per_token(whole, c.training.seq_len)
        self.n_parameters = parameter_count(whole)
        self.dispatcher = make_dispatcher(c, self.device, self.world.size)
        with live_line(), ExitStack() as opened:
            ranks = Ranks.patient(opened.enter_context(process_group(find_world(), self.device, c.comm)))
            opened.callback(release)
            check_agreement(lambda: run_facts(resolved(c, self.device), self.tokenizer, self.device), ranks)
            self.layout = make_layout(c.parallelism, self.device)
            with ranks.leader_first(self.world.local_rank):
                self.loaders = {"train": self._open(c.dataloader, "train")}
                self.loaders |= held_out_sets(c.validator, c.dataloader, self._open)
            check_agreement(lambda: text_facts(self.loaders), ranks)
            self.loader = self.loaders["train"]
            n_rows = self.rows_per_step = c.training.rows_per_step(self.layout.degrees.data)
            self.folder = ranks.first(lambda: make_run_folder(c.dump_folder, c.recipe))
            self.lock = opened.enter_context(FolderLock(self.folder, c.checkpoint, ranks))
            opened.enter_context(rank_files(self.folder, self.world.rank, logs=c.debug.log_every_rank))
            self.observers = Observers.built(c.observers, folder=self.folder, rank=self.world.rank)
            live = {"folder": self.folder, "ranks": ranks}
            self.checkpoints = RunCheckpoints(c, self.layout, plain, self.loader, self.observers, n_rows=n_rows, **live)
            self.last_step = last_step(c.training, self.loader, n_rows, self.checkpoints.start)
            self.metrics = c.metrics.build(settings=to_dict(config), start=self.checkpoints.start.step, **live)
            self.outcome = Outcome(c, whole, self.world, self.checkpoints, self.layout, self.folder, self.last_step)
            self.has_run, self.is_over = False, self.checkpoints.is_over(self.last_step)
            if not self.is_over:
                self._start_model()
                self.checkpoints.restore(self.built, self.optimizer)
            self.exit = opened.pop_all()

    @staticmethod
    def plan(config: Config, *, world_size: int | None, rank: int) -> Any:
        """What a step of such a run takes of one rank, worked out without running it: a `core.plan.plan.Plan`."""
        from core.plan.plan import plan  # loads much that a run does without

        return plan(config, world_size=world_size, rank=rank)

    def _open(self, data: Samples.Config, split: Split) -> Samples:
        training = self.config.training
        sizes = {"seq_len": training.seq_len, "rows_per_step": training.rows_per_step(self.layout.degrees.data)}
        return open_samples(data, self.tokenizer, self.layout, split, seed=self.config.debug.seed, **sizes)

    def _start_model(self) -> None:
        c = self.config
        self.compute_dtype = c.training.compute_dtype(self.device)
        self.activation_checkpoint = c.activation_checkpoint.build(folder=self.folder)
        n_rows = self.rows_per_step // self.layout.degrees.data
        dtype, n = getattr(torch, c.training.dtype), n_rows // c.parallelism.pipeline_parallel_microbatch_size
        start = {"dtype": dtype, "seed": c.debug.seed, "groups": c.optimizer.groups, "converters": c.converters}
        self.built = assemble(c.model, self.layout, self.wrapping(), n_microbatches=n, **start)
        for model in self.built.models if c.debug.moe_force_load_balance else ():
            force_balance(model)
        self.optimizer = c.optimizer.build(weights=self.built.weights(), layout=self.layout)
        self.schedule = c.lr_scheduler.build(steps=self.last_step)
        loss = c.loss.build(compile_backend=loss_backend(c.compile, c.loss, self.device))
        settings = {"layout": self.layout, "dtype": self.compute_dtype, "mask": c.training.mask_of(c.dataloader)}
        self.objective = self.make_objective(loss, **settings)
        self.validator = None
        if c.validator.enable:
            sizes = {"rows_per_step": self.rows_per_step, "local_batch_size": c.training.local_batch_size}
            loaders = {name: loader for name, loader in self.loaders.items() if name != "train"}
            live = {"objective": self.objective, "optimizer": self.optimizer, **sizes}
            self.validator = c.validator.build(loaders=loaders, text_bytes=TextBytes(self.tokenizer), **live)
        sizes = {"n_rows": self.rows_per_step, "local_batch_size": c.training.local_batch_size}
        self.rows = RowsAhead(self.loader, self.layout, self.checkpoints.first_row, last_step=self.last_step, **sizes)
        names = ("last_step", "layout", "checkpoints", "schedule", "metrics", "observers", "rows")
        live = {name: getattr(self, name) for name in names}
        self.report = StepReport(c, self.built.models, self.flops_per_token, **live)
        self.observers.begin(self.objective, self.tokenizer)

    def wrapping(self) -> Wrapping:
        """What is put around the blocks of the model, for an experiment that puts something else."""
        compiler, checkpoint = block_compiler(self.config.compile), self.activation_checkpoint.apply
        settings = {"compute_dtype": self.compute_dtype, "dispatcher": self.dispatcher}
        return Wrapping(checkpoint=checkpoint, compile_block=compiler, **settings)

    def make_objective(self, loss: Loss, **settings: Any) -> Objective:
        """What a step lowers, for an experiment that computes it in another way."""
        return Objective(self.built.models, loss, pipeline=self.built.pipeline, **settings)

    def summary(self) -> str:
        """The head of a run on the console."""
        return summary(
            self.config,
            self.layout.degrees,
            {"data": self.loader.description, "tokenizer": self.tokenizer.description},
            dtype=self.compute_dtype,
            flops=self.flops_per_token,
            n_tokens=self.tokenizer.vocab_size,
            **{name: getattr(self, name) for name in ("n_parameters", "last_step", "rows_per_step")},
            **{name: getattr(self, name) for name in ("conversions", "device", "folder", "schedule")},
        )

    def run(self) -> RunResult:
        """Train to the last step, or to the end of the step in which a signal or an observer asks to stop.

        A run that was finished before is left as it is. Raises `UserError` when it is called again.
        """
        if self.has_run:
            raise UserError("this Trainer has run: build another, with a dump_folder of its own, to train again")
        self.has_run = True
        if self.is_over:
            with self.exit:
                return self.outcome.again()
        began = time.perf_counter()
        with self.exit:
            log.info(self.summary(), extra=started(self.report))
            self.checkpoints.ranks.first(lambda: write_config(self.folder, config_text(self.config, self.device)))
            anomalies = torch.autograd.set_detect_anomaly(self.config.debug.detect_anomaly)
            live = {"folder": self.folder, "rank": self.world.rank, "device": self.device}
            profiler = self.config.profiling.build(start=self.checkpoints.start.step, **live)
            advice = memory_advice(self.device, self.config, self.layout.degrees)
            stop = StopRequest(saving=self.config.checkpoint.saving_signal)
            with stop, collected_garbage(), anomalies, profiler, self.metrics, advice:
                exchange = Exchange(self.layout, self.checkpoints, self.lock, stop, self.observers)
                step = self._loop(exchange, profiler)
            return self.outcome(step, exchange.cause, time.perf_counter() - began, self.report.last)

    def _loop(self, exchange: Exchange, profiler: Profiler) -> int:
        """Steps until the last or until a request to stop; returns the number of the last one."""
        c, mark = self.config, time.perf_counter()
        step = since = start = self.checkpoints.start.step
        while step < self.last_step and not exchange.stopping:
            step += 1
            if step % c.training.gc_freq == 0:
                gc.collect(1)
            info = profiler.measured(step, lambda n: self.report.measured(n, self.step), self.built, self.optimizer)
            profiler.step()
            if step == start + 1:
                self.activation_checkpoint.report()
                lower_timeout(c.comm)
            since, step = since + info.step - step, info.step  # a step may be a later one than was asked for
            step_time_s = (time.perf_counter() - mark) / (step - since)
            validator = self.validator if self.validator and self.validator.due(step, self.last_step) else None
            validation = validator.measure(exchange) if validator else None
            self.observers(info._replace(validation_loss=None if validation is None else validation.loss))
            exchange()
            if self.metrics.due(step, self.last_step) or validator is not None or exchange.stopping:
                self.report(step, info, step_time_s, validation)
                mark, since = time.perf_counter(), step
            mark += self.checkpoints.after_step(
                step,
                last=step == self.last_step,
                stopping=exchange.stopping,
                asked=exchange.take_save(),
                validation_loss=None if validation is None else validation.loss,
            )
        self.rows.close()
        self.checkpoints.finish()
        exchange()  # what was written is still there
        return step

    def step(self, step: int) -> StepInfo:
        """Train step number `step`, counted from 1. An override may train a later one: `StepInfo.step` tells."""
        c = self.config
        settings: dict[str, Any] = {
            "lr_factor": self.schedule.factor(step),
            **{name: getattr(c.training, name) for name in ("max_norm", "fixed_norm", "max_value")},
            "on_nonfinite": c.debug.on_nonfinite,
            "spikes": self.checkpoints.spikes,
            "sources": self.rows.sources(step),
        }
        return train_step(self.objective, self.optimizer, self.rows(step), step=step, **settings)

    def batches(self, step: int) -> list[Batch]:
        """The microbatches of `step`, counted from 1: rows are numbered over the whole run."""
        return self.rows.read(step)
