"""Let what was trained write: python -m graph_trainer.generate --checkpoint FOLDER --prompt TEXT."""

from core.generate.command import main

if __name__ == "__main__":
    main("graph_trainer.configs")
