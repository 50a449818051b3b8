"""Let a DeepSeek-V3 write: python -m deepseek_v3.generate --checkpoint FOLDER --prompt TEXT."""

from core.generate.command import main

if __name__ == "__main__":
    main("deepseek_v3.configs")
