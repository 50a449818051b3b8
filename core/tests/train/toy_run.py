"""A run of the toy model on a text of one page."""

import os
import signal
from pathlib import Path

from core.data.text import IndexedText
from core.optim.adam import AdamW
from core.optim.schedule import Schedule
from core.step.settings import Training
from core.step.update import StepInfo
from core.testing.toy import Toy
from core.train.metrics import Metrics
from core.train.trainer import Trainer

VERSES = [f"{n} green bottles hanging on the wall, and if one green bottle should fall\n" for n in range(200)]


def toy_run(folder: Path, *, steps: int = 4) -> Trainer.Config:
    """A run of a second on 200 documents; everything it writes lies in `folder`."""
    text = folder / "text"
    if not text.exists():
        text.mkdir(parents=True)
        for i, verse in enumerate(VERSES):
            (text / f"{i:03}.txt").write_text(verse)
    return Trainer.Config(
        recipe="toy",
        dump_folder=str(folder / "run"),
        model=Toy.Config(vocab_size=2048),
        dataloader=IndexedText.Config(dataset=str(text), cache_folder=str(folder / "cache"), validation_fraction=0.1),
        training=Training(steps=steps, seq_len=16, local_batch_size=4),
        optimizer=AdamW.Config(lr=1e-2),
        lr_scheduler=Schedule.Config(warmup_steps=2),
        metrics=Metrics.Config(log_freq=1),
    )


def train_until(trainer: Trainer, leaves_at: int) -> None:
    """Train, and be asked to stop in step `leaves_at`; 0 asks for nothing."""
    step = trainer.step

    def leaving(number: int) -> StepInfo:
        if number == leaves_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(number)

    trainer.step = leaving
    trainer.run()
