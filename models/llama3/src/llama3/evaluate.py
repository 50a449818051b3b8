"""Measure a Llama 3: python -m llama3.evaluate --checkpoint FOLDER --perplexity FILE."""

from core.evaluate.command import main

if __name__ == "__main__":
    main("llama3.configs")
