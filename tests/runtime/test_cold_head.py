"""The cold head in parts against a product of all cold rows at once."""

import shutil

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")
pytest.importorskip("torch")

import onnxruntime as ort

from tests.support.exports import read_float32
from tests.support.rounding import assert_within, gamma, product_bound
from trimserve.errors import MismatchError
from trimserve.folder.names import COLD_NAME
from trimserve.runtime.cold_head import PARTS_KEY, PartedGraph
from trimserve_export.cold_head import graph as cold_graph
from trimserve_export.cold_head.writing import write_cold_head

pytestmark = pytest.mark.export


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def parted(request, exported, tmp_path_factory):
    """Cold graphs of 26 cold rows in parts of one tile, which has three rows."""
    made = exported(request.param)
    folder = tmp_path_factory.mktemp("parts")
    shutil.copy(made.folder.file(COLD_NAME), folder)
    rows = read_float32(folder / COLD_NAME)["head"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cold_graph, "_TILE_BYTES", 3 * 4 * rows.shape[1])
        patch.setattr(cold_graph, "_TILES_A_PART", 1)
        write_cold_head(made.folder.path / "model.onnx", folder / COLD_NAME)
    capped = request.param == "gemma2"
    return folder, rows, capped


@pytest.mark.parametrize("threads", [1, 2, 20])
@pytest.mark.parametrize("steps", [1, 5])
def test_parts_together_are_the_whole_product(parted, threads, steps):
    folder, rows, capped = parted
    hidden = np.random.default_rng(steps).standard_normal((steps, 16), np.float32)
    expected, bound = hidden @ rows.T, product_bound(hidden, rows.T)
    if capped:  # a cap is never steeper than 1, and is a division, a tanh and a product
        expected = 5 * np.tanh(expected / 5)
        bound += 2 * gamma(8) * np.abs(expected)
    graph = PartedGraph(folder / "cold_head.onnx", threads=threads, packed=False)
    parts = graph.each(["logits"], hidden, lambda rows, outputs: (rows, outputs[0]))
    assert [rows.stop - rows.start for rows, _ in parts] == [3] * 8 + [2]
    assert_within(np.concatenate([part for _, part in parts]), expected.T, bound.T, rows=0)
    largest = PartedGraph(folder / "cold_max.onnx", threads=threads, packed=False)
    found = largest.each(["maximum", "row"], hidden, lambda _, outputs: outputs)
    values, places = (np.concatenate(column) for column in zip(*found, strict=True))
    np.testing.assert_array_equal(places[values.argmax(axis=0), np.arange(steps)], expected.argmax(axis=1))


def test_a_cold_graph_of_another_version_is_refused(exported):
    path = exported("llama").folder.path / "model.onnx"  # no parts are noted in it
    assert PARTS_KEY not in ort.InferenceSession(path).get_modelmeta().custom_metadata_map
    with pytest.raises(MismatchError, match="export the model again"):
        PartedGraph(path, threads=1, packed=False)
