"""What a model must say of itself to be read from Hugging Face's folders and written as one."""

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from torch import Tensor

from core.config.errors import UserError


class StoredModel(Protocol):
    """What a model must have to be kept in a folder of ours: its weights and its configuration."""

    config: Any

    def rope_dim(self) -> int: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def named_parameters(self, *, remove_duplicate: bool) -> Iterable[tuple[str, Tensor]]: ...


class HFModel(StoredModel, Protocol):
    """A model that Hugging Face has, too: a second parent of a `Decoder`, which does without."""

    HF: ClassVar[str]
    """Where its form stands, as "package.hf:FORM"; it is loaded when somebody asks for it."""

    @classmethod
    def hf_form(cls) -> Any:
        """How Hugging Face has this model: a `core.weights.hf_form.HFForm`."""
        module, _, name = cls.HF.partition(":")
        return getattr(import_module(module), name)

    PEERS: ClassVar[str] = ""
    """Where the forms of other programs that keep this model stand, as "package.peers:FORMS", by the name of each."""

    @classmethod
    def peer_forms(cls) -> Any:
        """How other programs keep this model: a `core.weights.keys.KeyForm` for each that `convert` reads."""
        module, _, name = cls.PEERS.partition(":")
        return getattr(import_module(module), name) if module else {}

    @classmethod
    def from_hf_config(cls, hf: dict) -> Any:
        """The configuration that a `config.json` states; raises `UserError` for what it cannot express."""
        return cls.hf_form().from_config(hf)

    @classmethod
    def from_published(cls, stated: dict, folder: Path, say: Callable[[str], object]) -> Any:
        """The configuration that a `config.json` in this folder states, which anybody may have written; `say` and
        errors as in `HFForm.published`."""
        return cls.hf_form().published(stated, folder, say)

    def to_hf_config(self) -> dict:
        """The `config.json` of this model; raises `UserError` where Hugging Face has no such one."""
        return self.hf_form().to_config(self.config)


def with_hf(model: object) -> HFModel:
    """A model, or a class of them, as one that Hugging Face has, too. Raises `UserError` for one that it has not."""
    if not hasattr(model, "hf_form"):
        name = (model if isinstance(model, type) else type(model)).__qualname__
        raise UserError(
            f"{name} has no form at Hugging Face, so it is not converted and not exported: derive it from "
            "core.weights.hf_model.HFModel as well, and state one"
        )
    return cast(HFModel, model)
