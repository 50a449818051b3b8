"""Let what was trained write: python -m z_loss.generate --checkpoint FOLDER --prompt TEXT."""

from core.generate.command import main

if __name__ == "__main__":
    main("z_loss.configs")
