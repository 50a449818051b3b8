"""Train a GPT-OSS: python -m gpt_oss.train --config gpt_oss_20b."""

from core.config.cli import main

if __name__ == "__main__":
    main("gpt_oss.configs")
