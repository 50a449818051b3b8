"""Train in replica groups: python -m fault_tolerance.train --config fault_tolerance_debug."""

from core.config.cli import main

if __name__ == "__main__":
    main("fault_tolerance.configs")
