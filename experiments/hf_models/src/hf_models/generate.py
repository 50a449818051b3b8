"""Let a model of transformers write: python -m hf_models.generate --checkpoint FOLDER --prompt TEXT."""

from core.generate.command import main
from hf_models.commands import HFGeneration

if __name__ == "__main__":
    main("hf_models.configs", command=HFGeneration)
