"""`python -m bench.encoder`."""

import sys

from bench.encoder.run import main

sys.exit(main())
