"""Train with a z-loss: python -m z_loss.train --config z_loss_debug."""

from core.config.cli import main

if __name__ == "__main__":
    main("z_loss.configs")
