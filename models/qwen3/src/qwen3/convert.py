"""Convert weights of Qwen3: python -m qwen3.convert from-hf SRC DST, or to-hf SRC DST."""

from core.weights.convert import main
from qwen3.model import Qwen3, Qwen3MoE

if __name__ == "__main__":
    main({"qwen3": Qwen3, "qwen2": Qwen3, "qwen3_moe": Qwen3MoE})
