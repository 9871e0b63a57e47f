"""Where the real corpora, tokenizers and models lie: the one finder of them, for benchmarks and for tests."""

import os
from pathlib import Path

from bench.machine import ROOT

VARIABLE = "TRIMSERVE_DATA"


def data_folder() -> Path:
    """The folder named by ``TRIMSERVE_DATA``, or ../shared/data beside the checkout; it may be absent."""
    return Path(os.environ.get(VARIABLE, ROOT.parent / "shared" / "data"))
