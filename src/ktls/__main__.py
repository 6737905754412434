"""``python -m ktls`` is the command ``ktls``."""

import sys

from ktls.cli import main

if __name__ == "__main__":
    sys.exit(main())
