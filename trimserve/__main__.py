"""`python -m trimserve`."""

import sys

from trimserve.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
