"""Train a DeepSeek-V3: python -m deepseek_v3.train --config deepseek_v3_16b."""

from core.config.cli import main

if __name__ == "__main__":
    main("deepseek_v3.configs")
