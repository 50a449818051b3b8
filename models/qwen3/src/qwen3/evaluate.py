"""Measure a Qwen3: python -m qwen3.evaluate --checkpoint FOLDER --perplexity FILE."""

from core.evaluate.command import main

if __name__ == "__main__":
    main("qwen3.configs")
