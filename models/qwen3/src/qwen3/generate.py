"""Let a Qwen3 write: python -m qwen3.generate --checkpoint FOLDER --prompt TEXT."""

from core.generate.command import main

if __name__ == "__main__":
    main("qwen3.configs")
