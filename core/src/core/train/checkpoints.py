"""Keeps a run from being lost: decides what it goes on from, restores that, and saves."""

import json
import logging
import time
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn import Parameter

from core.checkpoint.find import Found, candidates, find_in
from core.checkpoint.manifest import Damaged, Progress, read_manifest
from core.checkpoint.saver import SaveKind, Saver
from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.record import absolute, completed, place_paths
from core.data.samples import Samples
from core.nn.adapter import ADAPTER_WEIGHTS
from core.nn.decoder import Decoder
from core.optim.optimizer import Optimizer
from core.optim.weight import local_tensor
from core.parallel.layout import RankView
from core.quantization.converter import adapts
from core.runtime.activity import followed, working
from core.runtime.disk import needed
from core.runtime.ranks import Ranks
from core.step.assemble import BuiltModel
from core.step.checks import Run
from core.step.spikes import SpikeDetector
from core.train.adapter_start import adapters_at_start, fill_adapters
from core.train.folder import ANOTHER, config_text
from core.train.observers import Observers
from core.train.records import carry_on
from core.train.state import (
    check_optimizer_state,
    check_same_run,
    model_tensors,
    optimizer_tensors,
    random_tensors,
    set_random,
    stored_tensors,
    trained_tensors,
    weights_to_begin_with,
)
from core.weights.adapters import adapter_settings, begin_with
from core.weights.companions import run_companions
from core.weights.convert import write_as_hf
from core.weights.folder import folder_source, is_published, model_of, weights_under
from core.weights.peft_folder import is_peft
from core.weights.same_model import check_same_model

log = logging.getLogger("armature")


class RunCheckpoints:
    """What a run goes on from, and what it leaves to go on from. Every method but `progress` is a collective.

    Made before the model, so that a run that cannot go on ends before anything is allocated.
    """

    def __init__(
        self,
        run: Run,
        layout: RankView,
        model: Decoder,
        loader: Samples,
        observers: Observers,
        *,
        folder: Path,
        ranks: Ranks,
        n_rows: int,
    ) -> None:
        """`model` has no memory; a step reads `n_rows` rows over all ranks."""
        self.run, self.layout, self.ranks, self.model, self.loader = run, layout, ranks, model, loader
        self.settings, self.n_rows, self.folder, self.observers = run.checkpoint, n_rows, folder, observers
        text = config_text(run, layout.device)
        self.saver = Saver(self.settings, ranks, run_folder=folder, config=text, export=self._export)
        self.saver.check_writable()
        ranks.first(self._read_companions)
        self.found = self._find()
        self.spikes = SpikeDetector(run.debug)
        self.start = Progress(rows_per_step=n_rows, text=loader.fingerprint)
        """How far the run had come before."""
        if self.found is not None:
            self._go_on(self.found)
        self._adapters = None if self.found is not None else adapters_at_start(run, model)
        self._tokens_at_start: int | None = None
        self.saves = True
        """Whether `after_step` saves when it is time: of several copies of a run one does."""
        self.saved_step: int | None = None
        """The step that was saved last, since this process began."""
        self.owed = False
        """Whether a save was asked for that has not come."""
        self.further: dict[str, Tensor] = {}
        """What an experiment keeps beside weights and optimizer: tensors spread over the ranks, by names of one part of
        their own, as `outer.`; made before `restore`."""

    def _read_companions(self) -> None:
        if self.settings.saves:
            self.saver.companions = run_companions(self.run.tokenizer.path, self.settings.initial_load_path)

    def progress(self, step: int, validation_loss: float | None = None) -> Progress:
        """How far the run is after `step`."""
        rows = self.first_row(step + 1)
        if self._tokens_at_start is None:
            self._tokens_at_start = self.loader.tokens_before(self.start.rows)
        return Progress(
            step=step,
            tokens=self.start.tokens + self.loader.tokens_before(rows) - self._tokens_at_start,
            rows=rows,
            rows_per_step=self.n_rows,
            text=self.loader.fingerprint,
            validation_loss=validation_loss,
        )

    def stand_at(self, start: Progress) -> None:
        """Count rows and tokens from where another copy of the run began."""
        self.start, self._tokens_at_start = start, None

    def first_row(self, step: int) -> int:
        """The first row of a step, counted from 1."""
        return self.start.rows + (step - 1 - self.start.step) * self.n_rows

    def restore(self, built: BuiltModel, optimizer: Optimizer) -> None:
        """Fill the parts of this rank with what the run goes on from, or begins with; then make room in the folder."""
        weights, self._optimizer, adapted = model_tensors(built.models), optimizer, adapts(self.run.converters)
        self._weights = trained_tensors(weights) if adapted else weights
        self._begins = {n: weight for n, weight in weights.items() if n.rpartition(".")[2] not in ADAPTER_WEIGHTS}
        left = self.settings.exclude_from_loading
        if self.found is not None:
            if adapted and self.settings.initial_load_path is not None:
                self._begin_with(self.settings.initial_load_path)
            same_ranks = self.found.manifest.world_size == self.ranks.size
            random = random_tensors(self.ranks.rank, self.layout.device) if same_ranks and "random" not in left else {}
            tensors = {} if "model" in left else dict(self._weights)
            if "optimizer" not in left:
                keys = {key for each in self.ranks.gather(optimizer.state_keys()) for key in each}
                check_optimizer_state(self.found.tensors(), keys, optimizer, place=str(self.found))
                tensors |= optimizer_tensors(optimizer) | stored_tensors(self.further, self.found)
            self.saver.load(self.found, tensors | random)
            set_random(random, self.layout.device)
            if left:
                further = sorted({name.partition(".")[0] for name in self.further}) if "optimizer" in left else []
                names = ", ".join([*left, *further])
                log.info(f"checkpoint.exclude_from_loading: {names} of {self.found}: not loaded, begun anew")
            log.info(f"going on from {self.found} after step {self.start.step:,}")
        elif self.settings.initial_load_path is not None:
            self._begin_with(self.settings.initial_load_path)
            if self._adapters is not None:
                fill_adapters(self._adapters, self._weights, self.layout)
            log.info(f"beginning with the weights of {self.settings.initial_load_path}")
        self.saver.set_aside(self.start.step)
        self.ranks.first(self._carry_on)

    def _carry_on(self) -> None:
        with needed(self.folder, ANOTHER):
            carry_on(self.folder, self.start.step)

    def after_step(self, step: int, *, last: bool, stopping: bool, asked: bool, validation_loss: float | None) -> float:
        """Save the run, if it is time or somebody `asked`; returns the seconds that it took."""
        c, began = self.settings, time.perf_counter()
        self.owed |= asked
        if not (self.saves and self.saver.due(step, last=last or stopping or self.owed)):
            return 0.0
        self.saver.wait()  # until then the ranks' group is that of the save behind the run
        tensors = self._weights | optimizer_tensors(self._optimizer) | self.further
        tensors |= random_tensors(self.ranks.rank, self.layout.device)
        progress = self.progress(step, validation_loss)
        progress.places, progress.observers = self._places(), self.observers.state()
        progress.spikes = self.spikes.state()
        kind: SaveKind = "model" if last and c.last_save_model_only else "full"
        self.saver.save(progress, tensors, kind=kind, wait=last or stopping)
        self.saved_step, self.owed = step, False
        return time.perf_counter() - began

    @property
    def failed(self) -> bool:
        """Whether a save behind the run went wrong on this rank. (No collective.)"""
        return self.saver.failed

    def finish(self) -> None:
        """Wait for a save behind the run."""
        self.saver.wait()

    def check(self, failed: bool) -> None:
        """Raise what went wrong with a save behind the run, when it did on any rank."""
        if failed:
            self.saver.wait()
            raise RuntimeError("a checkpoint could not be saved by another rank")

    def last_saved(self) -> Found | None:
        """The newest checkpoint of this run; None where it has none, or not any more. (No collective.)"""
        if self.saved_step is None:
            return self.found if self._is_own(self.found) else None
        storage, folder = self.saver.storage, f"step-{self.saved_step}"
        try:
            return Found(storage, folder, read_manifest(storage, folder))
        except Damaged as damage:
            log.warning(f"{storage}/{folder} was saved by this run and is not whole any more: {damage}")
            return None

    def is_over(self, last_step: int) -> bool:
        """Whether the run that this one goes on from came to the last step.

        Raises `UserError` when that is a run of another folder, of which this one then has nothing to make.
        """
        if self.start.step < last_step:
            return False
        if not self._is_own(self.found):
            raise UserError(
                f"{self.found} is of step {self.start.step}, and the last step is {last_step}: nothing is left to "
                "train; raise training.steps, or begin with its weights alone, initial_load_model_only"
            )
        return True

    def _find(self) -> Found | None:
        c = self.settings
        found = self.saver.find()
        if found is None and (path := c.initial_load_path) is not None:
            if "://" not in path and not Path(path).exists():
                raise UserError(f"checkpoint.initial_load_path: there is no {absolute(path)}")
            found = None if c.initial_load_model_only else find_in(path, self.ranks)
        if found is not None and found.manifest.kind == "model":
            step, begins = found.manifest.progress.step, "train_state" in c.exclude_from_loading
            if self._is_own(found) and step >= self.run.training.steps and not begins:
                return found  # the run is over: nothing goes on from it
            raise UserError(
                f"{found} holds weights alone (checkpoint.last_save_model_only), and no run can go on from it: go on "
                "from an earlier one with --checkpoint.load_step, or begin in another folder with "
                f"--checkpoint.initial_load_path {found}"
            )
        return found

    def _is_own(self, found: Found | None) -> bool:
        return found is not None and str(found.storage) == str(self.saver.storage)

    def _go_on(self, found: Found) -> None:
        """Check that this is the run that was saved, and stand where it stood."""
        saved, left = found.manifest.progress, self.settings.exclude_from_loading
        lines = check_same_run(
            json.loads(self.saver.config),
            completed(found.config(), cast(Configurable.Config, self.run)),
            place=str(found),
            step=saved.step,
            rows_per_step=(saved.rows_per_step, self.n_rows),
            text=(saved.text, self.loader.fingerprint),
            places=place_paths(cast(Configurable.Config, self.run)),
            override=self.settings.allow_config_change,
        )
        for line in lines:
            log.info(f"changed since {found}: {line}")
        if "train_state" not in left:
            self.start.step, self.start.tokens = saved.step, saved.tokens
            self.observers.restore(saved.observers)
            self.spikes.restore(saved.spikes)
        if "dataloader" not in left:
            self.start.rows = saved.rows
            if saved.rows_per_step != self.n_rows:
                self.loader.go_on(saved.step, saved.rows)
            if saved.places:
                if len(saved.places) != self.layout.degrees.data:
                    raise UserError(
                        f"{found} was saved by {len(saved.places)} data ranks that read a stream, and here are "
                        f"{self.layout.degrees.data}: take as many"
                    )
                self.loader.load_state_dict(saved.places[self.layout.data_rank])

    def _places(self) -> list[dict[str, int]]:
        """Where each data rank stands in a stream."""
        places = dict(self.ranks.gather((self.layout.data_rank, self.loader.state_dict())))
        return [places[rank] for rank in range(self.layout.degrees.data)] if places[0] else []

    def _begin_with(self, path: str) -> None:
        c, allow = self.settings, self.settings.allow_model_change
        path = str(weights_under(path)) if adapts(self.run.converters) and is_peft(path) else path
        found = find_in(path, self.ranks) if self.ranks.first(lambda: next(candidates(path), None)) else None
        whole = all(weight.is_floating_point() for weight in self._begins.values() if isinstance(weight, Parameter))
        if whole and not c.initial_load_in_hf and found is not None and adapter_settings(found.config()) is None:
            check_same_model(self.model, model_of(found.config()), found, allow=allow)
            return self.saver.load(found, weights_to_begin_with(self._begins, found, self.model.config.n_layers))
        if c.initial_load_in_hf and not is_published(path):
            raise UserError(f"{path} is no Hugging Face folder: leave initial_load_in_hf out")
        source = folder_source(self.model, found or Path(path), allow_model_change=allow)
        few = source.in_few_bits()
        if few and not c.initial_load_in_hf_quantized:
            raise UserError(
                f"{path} stores {few} in few bits: add --checkpoint.initial_load_in_hf_quantized to decode them"
            )
        slices = {name: self._begins[f"model.{name}"] for name in source.pieces if f"model.{name}" in self._begins}
        with working("loading weights"):
            for name in followed(list(slices), lambda name: local_tensor(slices[name]).nbytes):
                begin_with(source, name, self.layout.local_slice(slices[name]))

    def _export(self, found: Found, folder: Path) -> None:
        folder.mkdir()
        dtype = getattr(torch, self.settings.export_dtype)
        write_as_hf(self.model, found, folder, dtype=dtype, say=log.info)
