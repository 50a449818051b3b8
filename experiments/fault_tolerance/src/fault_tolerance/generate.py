"""Let what was trained write: python -m fault_tolerance.generate --checkpoint FOLDER --prompt TEXT."""

from core.generate.command import main

if __name__ == "__main__":
    main("fault_tolerance.configs")
