"""The smallest model, and runs of it on a text of one page."""

from dataclasses import dataclass
from pathlib import Path

from core.data.loader import DataLoader
from core.nn.attention import Attention
from core.nn.decoder import Block, Decoder
from core.nn.feed_forward import FeedForward
from core.optim.optimizer import Optimizer
from core.optim.schedule import Schedule
from core.train.metrics import Metrics
from core.train.settings import Training
from core.train.trainer import Trainer

VERSES = [f"{n} green bottles hanging on the wall, and if one green bottle should fall\n" for n in range(200)]


class Toy(Decoder):
    """One kind of block, and no counterpart anywhere else."""

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        attention: Attention.Config
        feed_forward: FeedForward.Config

    config: Config

    def block(self, i: int) -> Block:
        c = self.config
        attention = c.attention.build(dim=c.dim, norm_eps=c.norm_eps, scale=self.scale)
        feed_forward = c.feed_forward.build(dim=c.dim, scale=self.scale)
        return Block(c.dim, norm_eps=c.norm_eps, attention=attention, feed_forward=feed_forward)

    def rope_dim(self) -> int:
        return self.config.attention.head_dim

    @classmethod
    def from_hf_config(cls, hf: dict) -> Decoder.Config:
        raise AssertionError("the toy has no Hugging Face counterpart")

    def to_hf_config(self) -> dict:
        raise AssertionError("the toy has no Hugging Face counterpart")


def toy_model(**changes: object) -> Toy.Config:
    settings: dict = dict(
        dim=16,
        n_layers=2,
        vocab_size=2048,
        max_seq_len=64,
        attention=Attention.Config(n_heads=4, n_kv_heads=2, head_dim=4, qk_norm=True),
        feed_forward=FeedForward.Config(hidden_dim=32),
    )
    return Toy.Config(**(settings | changes))


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
        model=toy_model(),
        dataloader=DataLoader.Config(dataset=str(text), cache_folder=str(folder / "cache"), validation_fraction=0.1),
        training=Training(steps=steps, seq_len=16, local_batch_size=4),
        optimizer=Optimizer.Config(lr=1e-2),
        lr_scheduler=Schedule.Config(warmup_steps=2),
        metrics=Metrics.Config(log_freq=1),
    )
