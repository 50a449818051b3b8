"""Let a Qwen3 write: python -m qwen3.generate --checkpoint FOLDER --prompt TEXT."""

from core.generate.command import main
from qwen3 import configs

if __name__ == "__main__":
    main(configs)
