"""The run of this experiment: a language model that learns to say what it sees."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from core.train.trainer import Trainer
from vlm.image_text import ImageText
from vlm.model import VLM

REFUSED = {
    "tensor_parallel_degree": "the stream is cut by tokens there, and patches come whole",
    "context_parallel_degree": "rows are cut by tokens there, and patches come whole",
    "expert_parallel_degree": "it was not tried with images",
    "pipeline_parallel_degree": "a pipeline hands on tokens alone",
}
"""Degrees that must be 1, and why."""


class VLMTrainer(Trainer):
    """A training run whose model reads images beside tokens; all else is as in any run, the plan too."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        # pyrefly: ignore[bad-override] - what core asks of a decoder is there
        model: VLM.Config
        """The language model, the tower, and the projector between."""
        # pyrefly: ignore[bad-override-mutable-attribute] - this run has no other
        dataloader: ImageText.Config = field(default_factory=ImageText.Config)
        """Images with captions."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from super().problems()
            for name, reason in REFUSED.items():
                if (degree := getattr(self.parallelism, name)) > 1:
                    yield f"parallelism.{name}", f"{name} {degree} with images: {reason}; set it to 1"
            vision, data = self.model.vision, self.dataloader
            for name in ("image_size", "n_patches"):
                if (ours := getattr(data, name)) != (theirs := getattr(vision, name)):
                    yield (
                        f"dataloader.{name}",
                        f"{name} {ours} of the data and {theirs} of the tower: set it to {theirs}",
                    )
            if self.checkpoint.last_save_in_hf:
                yield (
                    "checkpoint.last_save_in_hf",
                    "a model with a tower has no form at Hugging Face here: leave it out",
                )
