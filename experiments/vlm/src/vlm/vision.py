"""The tower that reads images, SigLIP's (arXiv:2303.15343), and what brings its patches into a language model.

Letters: B images, P patches, E width of the tower, N heads, H width of a head, D width of the language model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config.configurable import Configurable
from core.nn.layers import Linear
from core.nn.module import Flops, Module, size_problems
from core.nn.start import Constant, Normal, Scale

CHANNELS = 3


class LayerNorm(Module):
    """(x - mean) / deviation * weight + bias over the last dimension of x (..., E), in the dtype of x."""

    AXES = {"weight": ("embed",), "bias": ("embed",)}

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = (nn.Parameter(torch.empty(dim)) for _ in range(2))
        self.start = {"weight": Constant(1.0), "bias": Constant(0.0)}

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps).to(x.dtype)


class PatchLinear(Linear):
    """A linear layer with a bias for each of an image's patches; a row of tokens has one image."""

    def __init__(self, n_in: int, n_out: int, *, std: float, n_patches: int) -> None:
        super().__init__(n_in, n_out, std=std, bias=True)
        self.n_patches = n_patches

    def flops_per_token(self, seq_len: int) -> Flops:
        return Flops(matmul=2 * self.weight.numel() * self.n_patches // seq_len)


class SelfAttention(Module):
    """Attention of all patches of an image to all."""

    AXES = {
        "wq": ("heads", "embed"),
        "wk": ("heads", "embed"),
        "wv": ("heads", "embed"),
        "wo": ("embed", "heads"),
    }

    def __init__(self, dim: int, n_heads: int, *, scale: Scale, n_patches: int) -> None:
        super().__init__()
        self.n_heads, self.n_patches = n_heads, n_patches
        self.wq, self.wk, self.wv = (PatchLinear(dim, dim, std=scale.std, n_patches=n_patches) for _ in range(3))
        self.wo = PatchLinear(dim, dim, std=scale.residual, n_patches=n_patches)

    def forward(self, x_BPE: Tensor) -> Tensor:
        q, k, v = (
            part(x_BPE).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in (self.wq, self.wk, self.wv)
        )
        return self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def flops_per_token(self, seq_len: int) -> Flops:
        return Flops(attention=4 * self.n_patches**2 * self.wq.weight.shape[0] // seq_len)


class FeedForward(Module):
    """Two layers with a gelu between."""

    AXES = {"fc1": ("ffn", "embed"), "fc2": ("embed", "ffn")}

    def __init__(self, dim: int, hidden_dim: int, *, scale: Scale, n_patches: int) -> None:
        super().__init__()
        self.fc1 = PatchLinear(dim, hidden_dim, std=scale.std, n_patches=n_patches)
        self.fc2 = PatchLinear(hidden_dim, dim, std=scale.residual, n_patches=n_patches)

    def forward(self, x_BPE: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BPE), approximate="tanh"))


class VisionBlock(Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(
        self, dim: int, n_heads: int, hidden_dim: int, *, norm_eps: float, scale: Scale, n_patches: int
    ) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = (LayerNorm(dim, eps=norm_eps) for _ in range(2))
        self.attention = SelfAttention(dim, n_heads, scale=scale, n_patches=n_patches)
        self.feed_forward = FeedForward(dim, hidden_dim, scale=scale, n_patches=n_patches)

    def forward(self, x_BPE: Tensor) -> Tensor:
        x_BPE = x_BPE + self.attention(self.attention_norm(x_BPE))
        return x_BPE + self.feed_forward(self.ffn_norm(x_BPE))


class Vision(Module, Configurable):
    """SigLIP's tower without its last norm and its pooling: pixels (B, 3, S, S) to patches (B, P, E), row by row."""

    AXES = {"position": ("merge", "embed"), "patches": ("embed", "merge")}

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        dim: int
        """Width of the tower."""
        n_layers: int
        """Number of blocks."""
        n_heads: int
        """Heads of attention."""
        hidden_dim: int
        """Width inside the feed-forward network."""
        image_size: int
        """Pixels of an image on each side."""
        patch_size: int
        """Pixels of a patch on each side; it divides image_size."""
        norm_eps: float = 1e-6
        """Added to the variance in every norm."""
        init_std: float = 0.02
        """Standard deviation of every matrix at the start; those that write to the stream get less, by depth."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from size_problems(self, "dim", "n_layers", "n_heads", "hidden_dim")
            for name in ("image_size", "patch_size"):
                if not 1 <= getattr(self, name) <= 2**14:
                    yield name, f"{name} {getattr(self, name)} must be from 1 to {2**14}"
                    return
            if self.image_size % self.patch_size:
                yield "patch_size", f"patch_size {self.patch_size} must divide image_size {self.image_size}"
            if self.n_heads > 0 and self.dim % self.n_heads:
                yield "n_heads", f"n_heads {self.n_heads} must divide dim {self.dim}"

        @property
        def n_patches(self) -> int:
            return (self.image_size // self.patch_size) ** 2

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        scale = Scale.of_depth(c.init_std, c.n_layers)
        self.patches = PatchLinear(CHANNELS * c.patch_size**2, c.dim, std=c.init_std, n_patches=c.n_patches)
        self.position = nn.Parameter(torch.empty(c.n_patches, c.dim))
        self.start = {"position": Normal(c.init_std)}
        sizes = {"norm_eps": c.norm_eps, "scale": scale, "n_patches": c.n_patches}
        self.layers = nn.ModuleDict(
            {str(i): VisionBlock(c.dim, c.n_heads, c.hidden_dim, **sizes) for i in range(c.n_layers)}
        )

    def forward(self, pixels_BCSS: Tensor) -> Tensor:
        x_BPE = self.patches(unfolded(pixels_BCSS, self.config.patch_size)) + self.position
        for block in self.layers.values():
            x_BPE = block(x_BPE)
        return x_BPE


def unfolded(pixels_BCSS: Tensor, size: int) -> Tensor:
    """Patches of `size` x `size` pixels as rows of numbers (B, P, C size size), from the top left, row by row."""
    x = pixels_BCSS.unfold(2, size, size).unfold(3, size, size)  # (B, C, rows, columns, size, size)
    return x.permute(0, 2, 3, 1, 4, 5).reshape(len(x), x.shape[2] * x.shape[3], prod((x.shape[1], size, size)))


class Projector(Module, Configurable):
    """Brings patches (B, P, E) into the stream of a language model (B, P, D): two layers with a gelu between, as LLaVA
    1.5 has it (arXiv:2310.03744)."""

    AXES = {"linear_1": ("merge", "embed"), "linear_2": ("embed", "merge")}

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        init_std: float = 0.02
        """Standard deviation of both matrices at the start."""

    def __init__(self, config: Config, *, n_in: int, n_out: int, n_patches: int) -> None:
        super().__init__()
        self.config = config
        self.linear_1 = PatchLinear(n_in, n_out, std=config.init_std, n_patches=n_patches)
        self.linear_2 = PatchLinear(n_out, n_out, std=config.init_std, n_patches=n_patches)

    def forward(self, x_BPE: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x_BPE)))
