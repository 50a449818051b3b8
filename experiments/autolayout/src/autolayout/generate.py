"""Let what was trained write: python -m autolayout.generate --checkpoint FOLDER --prompt TEXT."""

from core.generate.command import main

if __name__ == "__main__":
    main("autolayout.configs")
