"""`python -m bench.trim`."""

import sys

from bench.trim.run import main

sys.exit(main())
