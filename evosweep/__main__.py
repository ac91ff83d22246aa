"""``python -m evosweep``."""

from evosweep.cli.main import main

if __name__ == "__main__":
    main()
