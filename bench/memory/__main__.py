"""`python -m bench.memory`."""

import sys

from bench.memory.run import main

sys.exit(main())
