"""Train a language model that sees: python -m vlm.train --config vlm_debug."""

from core.config.cli import main

if __name__ == "__main__":
    main("vlm.configs")
