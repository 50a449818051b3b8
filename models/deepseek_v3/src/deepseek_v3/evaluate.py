"""Measure a DeepSeek-V3: python -m deepseek_v3.evaluate --checkpoint FOLDER --perplexity FILE."""

from core.evaluate.command import main

if __name__ == "__main__":
    main("deepseek_v3.configs")
