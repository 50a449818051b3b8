"""Models that are nothing but weights: their names and shapes, and a family's table."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from core.weights.hf_form import HFForm
from core.weights.hf_model import HFModel
from core.weights.keys import KeyTable

N_LAYERS = 2


class Weights(nn.Module, HFModel):
    """Weights of these names and shapes, drawn from `seed`; the names in `buffers` are no parameters."""

    HF_KEYS: Any = {}
    HF_HALVES = frozenset()
    HF_IGNORED: Any = ()
    HF_COPIES: Any = {}

    def __init__(
        self,
        keys: KeyTable,
        shapes: dict[str, tuple[int, ...]],
        buffers: tuple[str, ...] = (),
        *,
        hf_config: dict | None = None,
        n_layers: int = N_LAYERS,
        seed: int = 9,
    ) -> None:
        super().__init__()
        self.HF_KEYS = keys
        self.config = SimpleNamespace(n_layers=n_layers)
        self._hf_config = hf_config or {"model_type": "weights"}
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            value = torch.randn(shape, generator=generator)
            if name in buffers:
                module.register_buffer(leaf, value)
            else:
                module.register_parameter(leaf, nn.Parameter(value))

    def rope_dim(self) -> int:
        return 8

    def hf_form(self) -> HFForm:
        return HFForm(
            keys=self.HF_KEYS,
            halves=self.HF_HALVES,
            ignored=self.HF_IGNORED,
            copies=self.HF_COPIES,
            from_config=lambda hf: NotImplemented,
            to_config=lambda _: dict(self._hf_config),
        )

    def values(self) -> dict[str, Tensor]:
        """A copy of all weights."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}
