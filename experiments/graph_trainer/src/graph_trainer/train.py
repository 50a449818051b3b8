"""Train with one graph per step: python -m graph_trainer.train --config graph_trainer_debug."""

from core.config.cli import main

if __name__ == "__main__":
    main("graph_trainer.configs")
