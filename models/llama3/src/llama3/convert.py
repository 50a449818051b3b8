"""Convert weights of Llama 3: python -m llama3.convert from-hf SRC DST, or to-hf SRC DST."""

from core.weights.convert import main
from llama3.model import Llama3

if __name__ == "__main__":
    main({"llama": Llama3})
