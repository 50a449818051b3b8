"""Train a DeepSeek-V3: python -m deepseek_v3.train --config deepseek_v3_16b."""

from core.config.cli import main
from deepseek_v3 import configs

if __name__ == "__main__":
    main(configs)
