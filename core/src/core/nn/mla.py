"""Multi-head latent attention.

Letters: B rows, L length, M length of the keys, D width, N heads, Q width of the queries' latent, C width of the keys'
and values' latent, P rotated width of a head, S other width of a head, V width of a value.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from core.config.configurable import Configurable
from core.nn.backends import backend_problems, kernel_class
from core.nn.kernel import KernelUse, KeyValues, Mask, SelfAttention
from core.nn.layers import Linear, RMSNorm
from core.nn.module import Flops, inference_forms, size_problems
from core.nn.rope import Rotation
from core.nn.start import Scale

LATENT_NORM_EPS = 1e-6
"""Added to the mean square in the norms of the latents, whatever the model's other norms add (as published)."""


class MLA(SelfAttention, Configurable):
    """Causal self-attention whose keys and values are drawn from one narrow latent per token (arXiv:2405.04434, 2.1).

    Ordinary attention keeps 2 K H numbers per token to attend to later: all its keys and values. Here a token leaves
    C + P: one latent, of which `wkv_b` makes the keys and values of all heads, and one short key that carries position.

        latent_C, k_P = split(wkv_a x)    k_S, v_V = split(wkv_b norm(latent))    k = [k_S, rotate(k_P)]

    Position needs a key of its own because a rotation between `wkv_b` and the product with the query would be another
    matrix for each distance, and the latent could not stand for all of them; all heads share that key. Queries are
    drawn from a latent, too, where `q_lora_rank` says so: that saves activations, not cache. Their heads are [S, P]
    wide, as the keys are, and values V: a kernel gets two widths. Tensor parallelism cuts `wq_b`, `wkv_b` and `wo` by
    heads; the latents are narrow and whole on every rank.
    """

    AXES = {
        "wq": ("heads", "embed"),
        "wq_a": ("lora", "embed"),
        "q_norm": ("lora",),
        "wq_b": ("heads", "lora"),
        "wkv_a": ("lora", "embed"),
        "kv_norm": ("lora",),
        "wkv_b": ("heads", "lora"),
        "wo": ("embed", "heads"),
    }

    SIZED_BY = {"heads": ("n_heads",)}

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        n_heads: int
        """Number of heads."""
        q_lora_rank: int | None
        """Width of the latent that queries are drawn from; None draws them from the residual stream."""
        kv_lora_rank: int
        """Width of the latent that keys and values are drawn from."""
        qk_nope_head_dim: int
        """Width of the part of a query or key that knows no position."""
        qk_rope_head_dim: int
        """Width of the rotated part."""
        v_head_dim: int
        """Width of a value."""
        backend: str = "sdpa"
        """Attention kernel: sdpa (PyTorch's scaled_dot_product_attention), flex (flex_attention; training needs a GPU),
        varlen (varlen_attn; needs a GPU), or one that a file of yours registers."""

        def problems(self) -> Iterator[tuple[str, str]]:
            ranks = ("q_lora_rank", "kv_lora_rank")
            wrong = dict(size_problems(self, "n_heads", *ranks, "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
            yield from wrong.items()
            if "qk_rope_head_dim" not in wrong and self.qk_rope_head_dim % 2:
                yield (
                    "qk_rope_head_dim",
                    f"qk_rope_head_dim {self.qk_rope_head_dim} must be even: rotary embedding turns pairs",
                )
            yield from backend_problems(self.backend)

        @property
        def qk_head_dim(self) -> int:
            return self.qk_nope_head_dim + self.qk_rope_head_dim

    def __init__(self, config: Config, *, dim: int, norm_eps: float, scale: Scale, temperature: float) -> None:
        """`temperature` squared multiplies logits: what YaRN leaves to attention (arXiv:2309.00071, section 3.4)."""
        del norm_eps
        super().__init__()
        self.config = c = config
        q_dim = c.n_heads * c.qk_head_dim
        if c.q_lora_rank is None:
            self.wq = Linear(dim, q_dim, std=scale.std)
        else:
            self.wq_a = Linear(dim, c.q_lora_rank, std=scale.std)
            self.q_norm = RMSNorm(c.q_lora_rank, eps=LATENT_NORM_EPS)
            self.wq_b = Linear(c.q_lora_rank, q_dim, std=scale.std)
        self.wkv_a = Linear(dim, c.kv_lora_rank + c.qk_rope_head_dim, std=scale.std)
        self.kv_norm = RMSNorm(c.kv_lora_rank, eps=LATENT_NORM_EPS)
        self.wkv_b = Linear(c.kv_lora_rank, c.n_heads * (c.qk_nope_head_dim + c.v_head_dim), std=scale.std)
        self.wo = Linear(c.n_heads * c.v_head_dim, dim, std=scale.residual)
        self.softmax_scale = c.qk_head_dim**-0.5 * temperature**2
        self.keys = KeyValues()
        self.kernel = kernel_class(c.backend)()
        self.asks = KernelUse(c.n_heads, c.n_heads, c.qk_head_dim, c.v_head_dim)

    def forward(self, x_BLD: Tensor, rotation: Rotation, mask: Mask) -> Tensor:
        c = self.config
        q_BLZ = self.wq(x_BLD) if c.q_lora_rank is None else self.wq_b(self.q_norm(self.wq_a(x_BLD)))
        q_BLNZ = q_BLZ.unflatten(-1, (-1, c.qk_head_dim))
        q_BLNS, q_BLNP = q_BLNZ.split((c.qk_nope_head_dim, c.qk_rope_head_dim), -1)
        latent_BLC, k_BLP = self.wkv_a(x_BLD).split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
        latent_BMC, k_BM1P = self.keys(self.kv_norm(latent_BLC), rotation(k_BLP.unsqueeze(2)))
        if self._absorbs(latent_BLC, latent_BMC):
            return self._from_latents(q_BLNS, rotation(q_BLNP), latent_BMC, k_BM1P, mask)
        kv_BMNZ = self.wkv_b(latent_BMC).unflatten(-1, (-1, c.qk_nope_head_dim + c.v_head_dim))
        k_BMNS, v_BMNV = kv_BMNZ.split((c.qk_nope_head_dim, c.v_head_dim), -1)
        q_BLNZ = torch.cat((q_BLNS, rotation(q_BLNP)), -1)
        k_BMNZ = torch.cat((k_BMNS, k_BM1P.expand(-1, -1, k_BMNS.shape[2], -1)), -1)
        q_BNLZ, k_BNMZ, v_BNMV = (side.transpose(1, 2) for side in (q_BLNZ, k_BMNZ, v_BMNV))
        o_BNLV = self.kernel(q_BNLZ, k_BNMZ, v_BNMV, mask, scale=self.softmax_scale)
        return self.wo(o_BNLV.transpose(1, 2).flatten(-2))

    def _absorbs(self, latent_BLC: Tensor, latent_BMC: Tensor) -> bool:
        """Whether tokens are so few beside the kept ones that `_from_latents` multiplies less."""
        c, n_new, n_keys = self.config, latent_BLC.shape[1], latent_BMC.shape[1]
        made = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
        wider = 2 * c.kv_lora_rank - c.qk_nope_head_dim - c.v_head_dim
        is_less = n_new * (made + n_keys * wider) < n_keys * made
        plain = type(self.wkv_b) is Linear and c.backend == "sdpa"  # others were asked for the widths of the heads
        return is_less and plain and inference_forms(latent_BLC) is not None

    def _from_latents(self, q_BLNS: Tensor, q_BLNP: Tensor, latent_BMC: Tensor, k_BM1P: Tensor, mask: Mask) -> Tensor:
        """The result (B, L, D) without keys and values of the heads: `wkv_b` goes to the few queries and the few sums.

            (W_k latent) . q = latent . (W_k^T q)        sum over M of a W_v latent = W_v (sum over M of a latent)

        Then all heads attend to one key, the latent and the rotated part, whose first C numbers are its value.
        """
        c = self.config
        w_NZC = self.wkv_b.weight.unflatten(0, (-1, c.qk_nope_head_dim + c.v_head_dim))
        w_NSC, w_NVC = w_NZC.split((c.qk_nope_head_dim, c.v_head_dim), 1)
        q_BNLC = torch.einsum("blns,nsc->bnlc", q_BLNS, w_NSC)
        q_BNLZ = torch.cat((q_BNLC, q_BLNP.transpose(1, 2)), -1)
        k_B1MZ = torch.cat((latent_BMC.unsqueeze(1), k_BM1P.transpose(1, 2)), -1)
        o_BNLC = self.kernel(q_BNLZ, k_B1MZ, k_B1MZ, mask, scale=self.softmax_scale)[..., : c.kv_lora_rank]
        return self.wo(torch.einsum("bnlc,nvc->blnv", o_BNLC, w_NVC).flatten(-2))

    def flops_per_token(self, seq_len: int) -> Flops:
        c = self.config
        return Flops(attention=2 * c.n_heads * (c.qk_head_dim + c.v_head_dim) * seq_len)
