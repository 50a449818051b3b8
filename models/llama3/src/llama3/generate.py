"""Let a Llama 3 write: python -m llama3.generate --checkpoint FOLDER --prompt TEXT."""

from core.generate.command import main

if __name__ == "__main__":
    main("llama3.configs")
