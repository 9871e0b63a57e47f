"""`python -m bench.quantize`."""

import sys

from bench.quantize.run import main

sys.exit(main())
