"""A causal language model of transformers as a model of core: its modules, under their own names.

Letters: B rows, L length, D width of the residual stream, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.record import absolute
from core.nn.decoder import HeadReader, logits
from core.nn.kernel import Positions
from core.nn.layers import Head
from core.nn.module import Flops, Module
from core.nn.start import Constant
from hf_models.folder import (
    Attention,
    folder_problem,
    keeps_documents_apart,
    sees_ahead,
    text_config,
    without_memory,
)
from hf_models.head import HeadDoor, WholeLogits, plain_head

LONGEST = 2**20
"""Positions of a model that states no limit."""


class HFModel(Module, Configurable):
    """Any causal language model that transformers has code for.

    Its modules are registered here under the names that they have there, so that weights, checkpoints and patterns have
    the names of its family. What core asks of a decoder is there: the blocks (`layers`), the embedding, the head.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        path: str = ""
        """A folder with a config.json of transformers, and weights where the run starts with them."""
        start: Literal["weights", "random"] = "weights"
        """Start with the weights of the folder, or draw them anew as transformers does."""
        attention: Attention = "auto"
        """What transformers computes attention with; auto is what it chooses for the model."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if problem := folder_problem(self.path):
                yield "path", problem
            elif self.start == "weights" and not any(Path(self.path).expanduser().glob("*.safetensors")):
                yield "start", f"{self.path} has no weights (*.safetensors): --model.start random draws them anew"
            elif sees_ahead(self.path, self.attention):
                yield "path", f"{self.path}: its tokens see later ones; say is_decoder true in its config.json"

        def places(self) -> dict[str, Any]:
            return {"path": absolute(self.path)}

        @property
        def n_layers(self) -> int:
            return text_config(self.path).num_hidden_layers

        @property
        def dim(self) -> int:
            return text_config(self.path).hidden_size

        @property
        def vocab_size(self) -> int:
            return text_config(self.path).vocab_size

        @property
        def max_seq_len(self) -> int:
            return getattr(text_config(self.path), "max_position_embeddings", None) or LONGEST

        @property
        def tie_embeddings(self) -> bool:
            return bool(text_config(self.path).tie_word_embeddings)

        @property
        def n_mtp_layers(self) -> int:
            return 0

    layers: nn.ModuleDict
    tok_embeddings: nn.Module
    output: nn.Module
    ahead: nn.ModuleDict
    norm: None = None  # it is gathered with what is left of the model
    config: Config
    theirs: Any
    door: HeadDoor | None
    checked: set[bool]
    """Ways to read pieces, rows that begin with no text or not, that were found to be right (`hf_models.cached`)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        theirs = without_memory(config.path, config.attention)
        own = [name for name, _ in [*theirs.named_parameters(recurse=False), *theirs.named_buffers(recurse=False)]]
        if own:
            raise UserError(f"{type(theirs).__name__} keeps {', '.join(own)} outside of its parts: it is not supported")
        head, place = theirs.get_output_embeddings(), plain_head(theirs, config.dim)
        for name, part in theirs.named_children():
            self.add_module(name, part)
        if place:
            head = own_head(head)
            self.add_module(place, head)
            theirs._modules[place] = HeadDoor(head)
        embedding = theirs.get_input_embeddings()
        for part in self.modules():
            state_axes(part, vocabulary=part is embedding or part is head)
        vars(self).update(  # seen under one name each by torch, and under these by core
            theirs=theirs,
            door=theirs._modules[place] if place else None,
            layers=nn.ModuleDict({str(i): block for i, block in enumerate(blocks_of(theirs, config.n_layers))}),
            tok_embeddings=embedding,
            output=head,
            ahead=nn.ModuleDict(),
            checked=set(),
        )

    @classmethod
    def from_published(cls, stated: dict[str, Any], folder: Path, say: Callable[[str], object]) -> Config:
        """The model of a folder of transformers, whose `config.json` states it."""
        return cls.Config(path=str(folder))

    def train(self, mode: bool = True) -> "HFModel":
        super().train(mode)
        self.theirs.training = mode
        return self

    def forward(self, tokens_BL: Tensor, positions: Positions | None = None, read: HeadReader | None = None) -> Tensor:
        """What `read` makes of the normalised residual stream (B, L, D) and the head; without it the logits (B, L, V).
        Where a model changes what its head makes, `read` gets the logits themselves, and a head that hands them on.
        Without `positions` every row is one document.
        """
        if tokens_BL.shape[1] > self.config.max_seq_len:
            raise UserError(f"{tokens_BL.shape[1]} positions asked for, the model has {self.config.max_seq_len}")
        positions = positions or Positions.rows(tokens_BL)
        apart = keeps_documents_apart(self.config.path, self.config.attention)  # others count positions by themselves
        where = {"position_ids": positions.position_BL.expand(tokens_BL.shape)} if apart else {}
        read = read or logits
        if self.door is None:
            made = self.theirs(input_ids=tokens_BL, use_cache=False, **where).logits
            return read(made, WholeLogits(), 0)
        with self.door.read_by(read):
            return self.theirs(input_ids=tokens_BL, use_cache=False, **where).logits

    def flops_per_token(self, seq_len: int) -> Flops:
        """Products with every matrix, of experts with those that a token is sent to, and attention to all keys. A head
        of core counts its own."""
        stated, n_layers, looked_up = text_config(self.config.path), self.config.n_layers, self.tok_embeddings.weight
        matmul = 0
        for weight in self.parameters():
            share = getattr(stated, "num_experts_per_tok", len(weight)) / len(weight) if weight.dim() == 3 else 1
            elsewhere = self.door is not None and weight is self.output.weight
            if weight.dim() > 1 and not elsewhere and (weight is not looked_up or self.config.tie_embeddings):
                matmul += int(2 * weight.numel() * share)
        n_heads = getattr(stated, "num_attention_heads", 0)
        width = n_heads * (getattr(stated, "head_dim", None) or self.config.dim // max(n_heads, 1))
        return Flops(matmul=matmul, attention=4 * n_layers * width * seq_len)


def own_head(theirs: Any) -> Head:
    """A head of core with the weight (V, D) of a head of transformers, which may be tied."""
    with torch.device("meta"):
        head = Head(theirs.in_features, theirs.out_features, std=0.0)
    head.weight = theirs.weight
    return head


def blocks_of(theirs: nn.Module, n_layers: int) -> nn.ModuleList:
    """The list of a model's blocks. Raises `UserError` where it has none of so many."""
    for part in theirs.modules():
        if isinstance(part, nn.ModuleList) and len(part) == n_layers:
            return part
    raise UserError(f"{type(theirs).__name__} has no list of {n_layers} blocks: it is not supported")


def state_axes(part: nn.Module, *, vocabulary: bool) -> None:
    """Name the axes of a module's own weights, which transformers does not: of a matrix, of a stack of them, of a
    vector. They start at 0: their values come from the folder. Optimizers want to know what is a matrix; nothing is cut
    by these names, as tensor parallelism is refused."""
    own = dict(part.named_parameters(recurse=False))
    if own and not isinstance(part, Head):
        axes = {name: axes_of(weight.dim(), vocabulary=vocabulary) for name, weight in own.items()}
        vars(part).update(AXES=axes, start={name: Constant(0.0) for name in own})


def axes_of(n_dims: int, *, vocabulary: bool) -> tuple[str, ...]:
    """The axes of a weight with so many dimensions."""
    if n_dims < 2:
        return ("embed",) * n_dims
    first = {2: "vocab" if vocabulary else "merge", 3: "experts"}.get(n_dims, "merge")
    return (first, *["merge"] * (n_dims - 2), "embed")
