"""Measure a GPT-OSS: python -m gpt_oss.evaluate --checkpoint FOLDER --perplexity FILE."""

from core.evaluate.command import main

if __name__ == "__main__":
    main("gpt_oss.configs")
