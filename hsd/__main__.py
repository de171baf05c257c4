"""``python -m hsd``: the command line of :mod:`hsd.cli`."""

import sys

from hsd.cli import main

if __name__ == "__main__":
    sys.exit(main())
