"""`python -m bench.finetune`."""

import sys

from bench.finetune.run import main

sys.exit(main())
