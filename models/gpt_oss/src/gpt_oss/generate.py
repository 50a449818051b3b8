"""Let a GPT-OSS write: python -m gpt_oss.generate --checkpoint FOLDER --prompt TEXT."""

from core.generate.command import main

if __name__ == "__main__":
    main("gpt_oss.configs")
