"""`python -m glit_models` is the `glit` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
