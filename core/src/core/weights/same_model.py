"""Whether weights are read into the model that they are of: one that has their shapes may compute something else."""

import logging
from typing import Any

from core.config.errors import UserError
from core.config.record import completed, differences, to_dict
from core.weights.hf_model import StoredModel

log = logging.getLogger("armature")

SAME_OUTPUT = (
    "class",
    "max_seq_len",
    "tie_embeddings",
    "init_std",
    "backend",
    "n_mtp_layers",
    "mtp_loss_weight",
    "load_balance_coeff",
    "balance_loss_coeff",
)
"""Settings, by the ends of their paths, of training and of how a machine computes, and those that the names of the
weights tell of. The class is compared before."""


def check_same_model(model: StoredModel, stated: dict[str, Any], place: object, *, allow: bool) -> None:
    """Compare `model` with the one whose weights lie at a place, as `stated` there: what may differ is logged.

    Raises `UserError` for another difference, such as the base of the rotary embedding: with it the weights would fit
    and compute something else. It is logged where `allow`.
    """
    found = differences(to_dict(model.config), completed(stated, model.config))
    lines = {
        setting: f"{setting} {before}, not {now}"
        for setting, before, now in found
        if setting != "class" and (setting, before) != ("n_mtp_layers", 0)  # of these the reader of weights tells
    }
    wrong = [line for setting, line in lines.items() if setting.rpartition(".")[2] not in SAME_OUTPUT]
    if wrong and not allow:
        raise UserError(
            "\n  ".join([f"{place}: the weights are of a model with", *wrong])
            + f"\ntake that model (--model.from {place} in training, no --config in generate), or these settings "
            "nevertheless: allow_model_change"
        )
    for line in lines.values():
        log.warning(f"{place}: the weights are of a model with {line}")
