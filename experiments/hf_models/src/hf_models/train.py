"""Train a model of transformers: python -m hf_models.train --config hf_models --model.path FOLDER."""

from core.config.cli import main

if __name__ == "__main__":
    main("hf_models.configs")
