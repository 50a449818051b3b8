"""Look at runs: python -m core.report RUN [RUN ...]."""

from core.report.command import main

if __name__ == "__main__":
    main()
