"""A language model that sees: a tower, a projector, and any decoder of ours.

Letters: B rows, L length, C channels, S pixels of a side, P patches, D width of the residual stream, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from core.config.configurable import Configurable
from core.nn.decoder import Decoder, HeadReader
from core.nn.kernel import Positions
from core.nn.layers import Embedding, Head, RMSNorm
from core.nn.module import Module
from core.nn.mtp import Predictions
from vlm.vision import Projector, Vision


class VLM(Module, Configurable):
    """A decoder that reads patches of an image in the places of some of its tokens.

    The parts of the decoder are registered here under the names that they have in it, so that its weights have the
    names of the decoder alone: a checkpoint of one begins a run of the other. What reads images is below `vision` and
    `projector`.
    """

    AXES = Decoder.AXES

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        decoder: Decoder.Config
        """The language model, any of ours."""
        vision: Vision.Config
        """The tower."""
        projector: Projector.Config = field(default_factory=Projector.Config)
        """What brings patches into the stream."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if self.decoder.n_mtp_layers:
                message = (
                    f"n_mtp_layers {self.decoder.n_mtp_layers}: tokens further ahead are not predicted; set it to 0"
                )
                yield "decoder.n_mtp_layers", message

        @property
        def n_layers(self) -> int:
            return self.decoder.n_layers

        @property
        def dim(self) -> int:
            return self.decoder.dim

        @property
        def vocab_size(self) -> int:
            return self.decoder.vocab_size

        @property
        def max_seq_len(self) -> int:
            return self.decoder.max_seq_len

        @property
        def tie_embeddings(self) -> bool:
            return self.decoder.tie_embeddings

        @property
        def n_mtp_layers(self) -> int:
            return 0

    config: Config
    decoder: Decoder
    layers: nn.ModuleDict
    tok_embeddings: Embedding
    norm: RMSNorm
    output: Head
    ahead: nn.ModuleDict

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        self.vision = c.vision.build()  # in the order of forward
        self.projector = c.projector.build(n_in=c.vision.dim, n_out=c.dim, n_patches=c.vision.n_patches)
        decoder: Decoder = c.decoder.build()
        for name, part in decoder.named_children():
            self.add_module(name, part)
        decoder.tok_embeddings = None  # it gets the stream with the patches in it, as a later stage of a pipeline does
        vars(self).update(decoder=decoder)

    def train(self, mode: bool = True) -> "VLM":
        super().train(mode)
        self.decoder.training = mode
        return self

    def forward(
        self,
        tokens_BL: Tensor,
        positions: Positions | None = None,
        read: HeadReader | None = None,
        *,
        pixels_BCSS: Tensor | None = None,
        is_patch_BL: Tensor | None = None,
    ) -> Tensor | Predictions:
        """As a decoder's; where `is_patch_BL` is true, the row's image stands in the place of tokens, patch by patch.

        Rows without an image have pixels that no place asks for.
        """
        x_BLD = self.tok_embeddings(tokens_BL)
        if pixels_BCSS is not None and is_patch_BL is not None:
            seen_BPD = self.projector(self.vision(pixels_BCSS)).to(x_BLD.dtype)
            patch_BL = (is_patch_BL.long().cumsum(1) - 1).clamp(0, seen_BPD.shape[1] - 1)
            placed_BLD = seen_BPD.gather(1, patch_BL.unsqueeze(-1).expand_as(x_BLD))
            x_BLD = torch.where(is_patch_BL.unsqueeze(-1), placed_BLD, x_BLD)
        return self.decoder(x_BLD, positions or Positions.rows(tokens_BL), read)
