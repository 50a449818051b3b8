"""Let a DeepSeek-V3 write: python -m deepseek_v3.generate --checkpoint FOLDER --prompt TEXT."""

from core.generate.command import main
from deepseek_v3 import configs

if __name__ == "__main__":
    main(configs)
