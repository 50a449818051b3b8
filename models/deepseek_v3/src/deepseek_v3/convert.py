"""Convert weights of DeepSeek-V3 and V2: python -m deepseek_v3.convert from-hf SRC DST, or to-hf SRC DST."""

from core.weights.convert import main
from deepseek_v3.model import DeepSeekV3

if __name__ == "__main__":
    main({"deepseek_v3": DeepSeekV3, "deepseek_v2": DeepSeekV3, "kimi_k2": DeepSeekV3})
