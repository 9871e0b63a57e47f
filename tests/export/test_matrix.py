"""The matrix of docs/matrix.md: what it says of each cell is what is found."""

from collections.abc import Iterable

import pytest

pytest.importorskip("torch")

import onnx_ir as ir

from bench import harness
from tests.support.matrix import (
    CELLS,
    FOLDERS,
    LAYOUTS,
    Cell,
    Workbench,
    compare,
    folder_outcome,
    is_in_ci,
    is_quick,
)
from trimserve.folder.opening import open_folder
from trimserve_export.exporters.choice import is_installed
from trimserve_export.exporters.exporter import EXPORTERS

pytestmark = [pytest.mark.export, pytest.mark.optimum]

RECORDED = {
    name: outcome
    for row in harness.newest_rows("matrix", "exporter")
    for name, outcome in row["outcomes"].items()
}
HERE = [cell for cell in CELLS if is_installed(cell.exporter)]


def by_model(cells: Iterable[Cell]) -> list:
    """Cells that share what an exporter traces, so that one test has it traced once."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(f"{cell.family}-{cell.exporter}", []).append(cell)
    return [pytest.param(group, id=name) for name, group in groups.items()]


@pytest.mark.parametrize("cells", by_model(filter(is_quick, HERE)))
def test_cells_are_as_recorded(tmp_path, cells):
    workbench = Workbench(tmp_path)
    found = {str(cell): workbench.outcome(cell) for cell in cells}
    assert found == {name: RECORDED[name] for name in found}


@pytest.mark.slow
@pytest.mark.parametrize("cells", by_model(cell for cell in HERE if is_in_ci(cell) and not is_quick(cell)))
def test_other_cells_are_as_recorded(tmp_path, cells):
    workbench = Workbench(tmp_path)
    found = {str(cell): workbench.outcome(cell) for cell in cells}
    assert found == {name: RECORDED[name] for name in found}


def test_a_wrong_number_is_found(tmp_path):
    """One flipped bit of a kept row makes the comparison fail."""
    cell = Cell("bert_encoder", next(name for name in EXPORTERS if name != "genai"), "fp32", "tokenizer")
    if not is_installed(cell.exporter):
        pytest.skip("its exporter is not installed")
    workbench = Workbench(tmp_path)
    assert workbench.outcome(cell) == "ok"
    folder = open_folder(tmp_path / str(cell))
    data = tmp_path / str(cell) / "model.onnx_data"
    content = bytearray(data.read_bytes())
    weights = ir.load(tmp_path / str(cell) / "model.onnx").graph.initializers.values()
    kept = len(workbench.model(cell.family).vocab)
    (table,) = [weight.const_value for weight in weights if weight.shape and weight.shape[0] == kept]
    for row in range(kept):
        content[table.offset + row * table.nbytes // kept + 3] ^= 1
    data.write_bytes(content)
    with pytest.raises(AssertionError, match="differs"):
        compare(folder, workbench.full_model(cell))


@pytest.mark.realdata
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FOLDERS)
def test_folder_is_as_recorded(data_dir, tmp_path, name, layout):
    found = folder_outcome(name, data_dir / "models" / "onnx-layouts", layout, tmp_path)
    assert found == RECORDED[f"{name}-folder-{layout}"]


def test_every_cell_is_recorded():
    folders = {f"{name}-folder-{layout}" for name in FOLDERS for layout in LAYOUTS}
    assert RECORDED.keys() == {str(cell) for cell in CELLS} | folders
