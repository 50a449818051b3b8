"""Models of other programs beside ours: the same weights, the same logits."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from core.config.record import to_json
from core.nn.decoder import Decoder
from core.testing.toy import on_cpu
from core.weights.convert import main
from core.weights.folder import load_folder
from core.weights.hf_model import HFModel


def converted(peer: str, folder: Path, config: Decoder.Config, models: Mapping[str, type[HFModel]]) -> Decoder:
    """The model that `convert from-PEER` of one of these families makes of what lies in `theirs`."""
    (folder / "model.json").write_text(to_json(config))
    words = [f"from-{peer}", str(folder / "theirs"), str(folder / "ours"), "--config", str(folder / "model.json")]
    main(models, words)
    model = on_cpu(config)
    load_folder(model, folder / "ours")
    return model.eval()


@torch.no_grad()
def draw(model: nn.Module, std: float) -> None:
    """Fill the weights of a model: with numbers around 0, those of vectors around 1."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * std + (weight.dim() == 1))


@torch.no_grad()
def assert_same_logits(ours: Decoder, theirs: nn.Module, atol: float) -> None:
    """That two models make the same of some tokens."""
    tokens_BL = torch.randint(0, ours.config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(2))
    expected = theirs(tokens_BL)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(tokens_BL), expected, rtol=0, atol=atol)
