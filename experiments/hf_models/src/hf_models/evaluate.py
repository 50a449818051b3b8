"""Measure a model of transformers: python -m hf_models.evaluate --checkpoint FOLDER --perplexity FILE."""

from core.evaluate.command import main
from hf_models.commands import HFEvaluation

if __name__ == "__main__":
    main("hf_models.configs", command=HFEvaluation)
