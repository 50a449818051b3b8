"""Convert weights of GPT-OSS: python -m gpt_oss.convert from-hf SRC DST, or to-hf SRC DST."""

from core.weights.convert import main
from gpt_oss.model import GptOss

if __name__ == "__main__":
    main({"gpt_oss": GptOss})
