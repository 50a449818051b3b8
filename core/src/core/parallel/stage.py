"""A stage of torch.distributed.pipelining as torch 2.11 to 2.15 have it in common."""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp
from torch.distributed.pipelining import _utils
from torch.distributed.pipelining.stage import PipelineStage


class Stage(PipelineStage):
    """PyTorch's stage, without what earlier releases cannot do."""

    def _get_init_p2p_neighbors_ops(self) -> list[P2POp]:
        """First messages to the neighbours that are on other ranks: gloo sends none to itself (torch 2.11)."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.peer != dist.get_rank()]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """A microbatch's result, of which tensors alone are kept as inputs: a backward in two passes asks each for its
        gradient (until torch 2.13)."""
        result = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        cache = getattr(self, "fwd_cache", {})
        if fwd_chunk_id in cache:
            outputs, inputs = cache[fwd_chunk_id]
            cache[fwd_chunk_id] = outputs, [value for value in inputs if isinstance(value, Tensor)]
        return result

    def know_shapes(self, n_microbatches: int, enters: Tensor, leaves: Tensor) -> None:
        """Make what it receives in. What enters and leaves it is of any shape: to learn it means to ask others."""
        stage: Any = self
        stage.has_backward = True
        if hasattr(stage, "inputs_meta"):  # torch 2.11
            stage.inputs_meta, stage._outputs_meta = (enters,), (leaves,)
            stage._prepare_forward_infra(n_microbatches, (enters,), {})
        else:
            metas = [_utils.extract_tensor_metas((tensor,)) for tensor in (enters, leaves)]
            stage._user_meta = _utils._StageMeta(inputs=metas[0], outputs=metas[1])
            stage._inference_mode = _utils.InferenceMode.STATIC
            stage._prepare_forward_infra(n_microbatches, (enters,), {}, has_backward=True)
        stage._prepare_backward_infra(n_microbatches)
