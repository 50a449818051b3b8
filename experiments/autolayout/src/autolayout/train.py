"""Train in the layout that is found: python -m autolayout.train --config autolayout_debug."""

from core.config.cli import main

if __name__ == "__main__":
    main("autolayout.configs")
