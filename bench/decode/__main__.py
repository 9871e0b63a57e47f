"""`python -m bench.decode`."""

import sys

from bench.decode.run import main

sys.exit(main())
