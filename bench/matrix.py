"""Every family x exporter x quantisation x layout: does the trimmed model give the full model's numbers?

Each cell trims a tiny model of its family, exports it, and compares all outputs with the untrimmed model's,
exported and quantised alike, by `np.array_equal` in ONNX Runtime on the CPU (tests/support/matrix.py).
Exporters that need another environment are left out: run it in each. Folders of other tools' graphs come from
TRIMSERVE_DATA.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import harness
from tests.support import matrix
from trimserve.console import progress
from trimserve_export.exporters.choice import is_installed
from trimserve_export.exporters.exporter import EXPORTERS, load_exporter

FOLDER = "folder"


def main() -> int:
    """Run the cells of each exporter that is installed, and save a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exporter", nargs="+", choices=(*EXPORTERS, FOLDER), help="default: all installed")
    arguments = parser.parse_args()
    names = arguments.exporter or [*(name for name in EXPORTERS if is_installed(name)), FOLDER]
    for name in names:
        outcomes = dict(_folders() if name == FOLDER else _cells(name))
        versions = {} if name == FOLDER else load_exporter(name).versions()
        row = {"exporter": name, "versions": versions, "outcomes": outcomes}
        harness.save_row("matrix", row, quick=False)
        counts = {
            kind: sum(text.startswith(kind) for text in outcomes.values())
            for kind in ("ok", "refused", "not")
        }
        harness.report(f"{name}: {counts}", row)
    return 0


def _cells(exporter: str) -> Iterator[tuple[str, str]]:
    cells = [cell for cell in matrix.CELLS if cell.exporter == exporter]
    with tempfile.TemporaryDirectory() as root, progress(len(cells), exporter, "cell") as bar:
        workbench = matrix.Workbench(Path(root))
        for cell in cells:
            yield str(cell), workbench.outcome(cell)
            bar.update()


def _folders() -> Iterator[tuple[str, str]]:
    data = harness.data_folder() / "models" / "onnx-layouts"
    for name in matrix.FOLDERS:
        for layout in matrix.LAYOUTS:
            with tempfile.TemporaryDirectory() as root:
                yield f"{name}-{FOLDER}-{layout}", matrix.folder_outcome(name, data, layout, Path(root))


if __name__ == "__main__":
    sys.exit(main())
