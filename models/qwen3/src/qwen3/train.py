"""Train a Qwen3: python -m qwen3.train --config qwen3_1_7b."""

from core.config.cli import main

if __name__ == "__main__":
    main("qwen3.configs")
