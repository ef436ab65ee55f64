"""``python -m fusion_pass``: see :mod:`fusion_pass.cli`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
