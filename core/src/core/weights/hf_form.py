"""How Hugging Face has a model: names of weights, and `config.json`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.weights.files import stored_keys
from core.weights.hf_types import check_types
from core.weights.keys import KeyForm
from core.weights.schemes import check_scheme


def no_advice(config: Any) -> str:
    """There is nothing to know."""
    return ""


@dataclass(frozen=True, kw_only=True)
class HFForm(KeyForm):
    """How Hugging Face has a model: names of weights, and `config.json` both ways."""

    from_config: Callable[[dict], Configurable.Config]
    """The configuration that a `config.json` states; raises `UserError` for what it cannot express."""
    to_config: Callable[[Any], dict]
    """The `config.json` of a model of this configuration; raises `UserError` where there is none."""
    mtp_key: str = ""
    """A key that every block for multi-token prediction has; its number is `{i}`. "" where the family has none."""
    advice: Callable[[Any], str] = no_advice
    """What one should know about a configuration that was read, in a line; "" is nothing."""

    def published(self, stated: dict, folder: Path, say: Callable[[str], object]) -> Any:
        """The configuration that a `config.json` in this folder states, which anybody may have written.

        Blocks for multi-token prediction that it states and whose weights are not there are left out, which `say` is
        told, and the `advice`. Raises `UserError` for what cannot be understood, `OtherFamily` for that of another
        family.
        """
        try:
            check_types(stated)
            config: Any = self.from_config(stated)
            check_scheme(stated)
            if self.mtp_key and config.n_mtp_layers and (keys := stored_keys(folder)):
                blocks = range(config.n_layers, config.n_layers + config.n_mtp_layers)
                there = sum(self.mtp_key.replace("{i}", str(i)) in keys for i in blocks)
                if there < config.n_mtp_layers:
                    say(
                        f"multi-token prediction: {config.n_mtp_layers} of its blocks are stated, the weights of "
                        f"{there} are there: the model has {there}"
                    )
                config.n_mtp_layers = there
            if line := self.advice(config):
                say(line)
            return config
        except UserError:
            raise
        except (ValueError, TypeError, ArithmeticError) as error:
            raise UserError(str(error)) from error
