"""Let a GPT-OSS write: python -m gpt_oss.generate --checkpoint FOLDER --prompt TEXT."""

from core.generate.command import main
from gpt_oss import configs

if __name__ == "__main__":
    main(configs)
