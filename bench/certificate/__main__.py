"""`python -m bench.certificate`."""

import sys

from bench.certificate.run import main

sys.exit(main())
