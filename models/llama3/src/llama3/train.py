"""Train a Llama 3: python -m llama3.train --config llama3_8b."""

from core.config.cli import main

if __name__ == "__main__":
    main("llama3.configs")
