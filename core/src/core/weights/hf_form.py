"""How Hugging Face has a model: names of weights, and `config.json`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.weights.hf_types import check_types
from core.weights.keys import KeyTable


@dataclass(frozen=True, kw_only=True)
class HFForm:
    """How Hugging Face has a model: names of weights, and `config.json` both ways."""

    keys: KeyTable
    """Where each weight is kept: a table as `core.weights.keys` describes it."""
    from_config: Callable[[dict], Configurable.Config]
    """The configuration that a `config.json` states; raises `UserError` for what it cannot express."""
    to_config: Callable[[Any], dict]
    """The `config.json` of a model of this configuration; raises `UserError` where there is none."""
    halves: frozenset[str] = frozenset()
    """Those of our names whose rows, head by head, are pairs (0, 1), (2, 3), ... here and halves there."""
    ignored: tuple[str, ...] = ("*rotary_emb.inv_freq",)
    """Keys that are passed over: `*` is anything, `{n_layers+i}` the number of a block that the model does not have."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Keys that repeat the named weight of ours in each block behind the last one, `{n_layers+i}`."""

    def published(self, stated: dict) -> Configurable.Config:
        """The configuration that a `config.json` states which anybody may have written.

        Raises `UserError` for what cannot be understood, `OtherFamily` for that of another family.
        """
        try:
            check_types(stated)
            return self.from_config(stated)
        except UserError:
            raise
        except (ValueError, TypeError, ArithmeticError) as error:
            raise UserError(str(error)) from error
