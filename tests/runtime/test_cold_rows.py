import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

from tests.support.folders import make_folder
from trimserve.errors import MismatchError, UnknownIdError
from trimserve.files.tensors import TensorSpec, to_bfloat16, write_tensors
from trimserve.process import memory
from trimserve.runtime.cold_rows import ColdRows

V, H = 37, 5
KEPT = [0, 3, 4, 9, 17, 18, 19, 30, 31, 35, 36]
COLD = np.setdiff1d(np.arange(V), KEPT)
FULL = np.random.default_rng(0).normal(size=(V, H)).astype(np.float32)
HEAD = np.random.default_rng(1).normal(size=(V, H)).astype(np.float32)
BIAS = np.random.default_rng(2).normal(size=V).astype(np.float32)


def cold(tmp_path, arrays, *, dtype="fp32", metadata=None, **options):
    folder = make_folder(tmp_path / "folder", KEPT, V, cold_rows=save(arrays, metadata), dtype=dtype)
    return ColdRows(folder, **options)


def save_bfloat16(path: Path, bits: np.ndarray) -> bytes:
    class Bits:
        dtype, shape = "BF16", bits.shape

        def write_to(self, file):
            yield file.write(bits.astype("<u2").tobytes())

    for _ in write_tensors(path, {"embedding": Bits()}):
        pass
    return path.read_bytes()


def test_rows_are_those_of_the_full_matrix(tmp_path):
    rows = cold(tmp_path, {"embedding": FULL[COLD], "head": HEAD[COLD], "head_bias": BIAS[COLD]})
    ids = [34, 1, 1, 16]
    np.testing.assert_array_equal(rows.embedding(ids), FULL[ids])
    np.testing.assert_array_equal(rows.head(ids), HEAD[ids])
    np.testing.assert_array_equal(rows.head_bias(ids), BIAS[ids])
    np.testing.assert_array_equal(rows.embedding(COLD), FULL[COLD])
    assert (len(rows), rows.width, rows.has_head, rows.has_head_bias) == (len(COLD), H, True, True)


def test_no_cold_id_gives_one_zero_embedding_row_and_no_head_row(tmp_path):
    rows = cold(tmp_path, {"embedding": FULL[COLD], "head": HEAD[COLD]})
    np.testing.assert_array_equal(rows.embedding([]), np.zeros((1, H), np.float32))
    assert rows.head([]).shape == (0, H)


def test_tied_head_is_the_embedding(tmp_path):
    rows = cold(tmp_path, {"embedding": FULL[COLD]}, metadata={"tied": "true"})
    np.testing.assert_array_equal(rows.head([1, 34]), FULL[[1, 34]])
    assert rows.spec("head") == rows.spec("embedding")
    assert isinstance(rows.spec("head"), TensorSpec)


def test_an_encoder_has_no_head_rows(tmp_path):
    rows = cold(tmp_path, {"embedding": FULL[COLD]})
    assert not rows.has_head
    with pytest.raises(MismatchError, match="no 'head' rows"):
        rows.head([1])


@pytest.mark.parametrize("bad", [3, 36, -1, 37, 2**31])
def test_an_id_without_a_cold_row_is_an_error_never_another_row(tmp_path, bad):
    rows = cold(tmp_path, {"embedding": FULL[COLD]})
    with pytest.raises(UnknownIdError, match=re.escape(f"{bad:,}")):
        rows.embedding([1, bad])


def test_bfloat16_becomes_float32_exactly(tmp_path):
    bits = np.random.default_rng(3).integers(0, 2**16, (len(COLD), H), dtype=np.uint16)
    content = save_bfloat16(tmp_path / "bf16", bits)
    rows = ColdRows(make_folder(tmp_path / "folder", KEPT, V, cold_rows=content))
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(rows.embedding(COLD).view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(
        ColdRows(make_folder(tmp_path / "b", KEPT, V, cold_rows=content), "bf16").embedding(COLD), bits
    )


def test_float32_is_rounded_to_the_nearest_float16_ties_to_even(tmp_path):
    step = 2.0**-10  # of float16 between 1 and 2
    values = np.full((len(COLD), H), 1.0, np.float32)
    values[0] = [1 + step / 2, 1 + 3 * step / 2, 1 + step / 2 + 2.0**-20, 70000.0, 2.0**-25]
    rows = cold(tmp_path, {"embedding": values}, dtype="fp16").embedding(COLD[:1])
    assert rows.dtype == np.float16
    assert rows[0].tolist() == [1.0, 1 + 2 * step, 1 + step, np.inf, 0.0]


@given(hnp.arrays(np.uint32, st.integers(1, 64)))
def test_rounding_to_bfloat16_is_that_of_ml_dtypes(bits):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = bits.view(np.float32)
    ours = (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(ours, values.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_folder_without_cold_rows_gives_the_zero_row_and_refuses_ids(tmp_path):
    rows = ColdRows(make_folder(tmp_path / "folder", KEPT, V), widths=[H])
    np.testing.assert_array_equal(rows.embedding([]), np.zeros((1, H), np.float32))
    assert (len(rows), rows.has_head) == (0, False)
    with pytest.raises(UnknownIdError, match="--no-cold"):
        rows.embedding([1])


@pytest.mark.parametrize(
    "arrays",
    [
        {"embedding": FULL},
        {"embedding": FULL[COLD].astype(np.int32)},
        {"embedding": FULL[COLD], "head_bias": BIAS},
        {"head": HEAD[COLD]},
    ],
)
def test_rows_that_do_not_fit_the_vocab_are_refused(tmp_path, arrays):
    with pytest.raises(MismatchError, match="export the folder again"):
        cold(tmp_path, arrays)


def test_rows_that_do_not_fit_the_graph_are_refused(tmp_path):
    with pytest.raises(MismatchError, match="rows of 5 entries but the graph takes 6"):
        cold(tmp_path, {"embedding": FULL[COLD]}, widths=[6])


def test_a_vocab_that_keeps_everything_has_no_cold_row(tmp_path):
    empty = save({"embedding": np.zeros((0, H), np.float32)})
    rows = ColdRows(make_folder(tmp_path / "folder", range(V), V, cold_rows=empty))
    assert rows.embedding([]).shape == (1, H)
    with pytest.raises(UnknownIdError):
        rows.embedding([0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_reading_every_row_leaves_no_copy_in_memory(tmp_path):
    vocab_size, width = 40_000, 512  # 80 MB of cold rows
    values = np.ones((vocab_size - 11, width), np.float32)
    make_folder(tmp_path / "folder", range(11), vocab_size, cold_rows=save({"embedding": values}))
    script = """
import sys
from pathlib import Path
import numpy as np
from trimserve.runtime.cold_rows import ColdRows
from trimserve.folder import open_folder

def anonymous():
    return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('RssAnon'))

folder = open_folder(Path(sys.argv[1]))
before = anonymous()
rows = ColdRows(folder)
total = sum(float(rows.embedding(ids).sum()) for ids in np.array_split(rows.cold_ids, 400))
assert total == len(rows) * rows.width
print(anonymous() - before)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "folder")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < values.nbytes / 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_scattered_rows_leave_the_file_out_of_resident_memory(tmp_path):
    size, width = 8192, 512  # 16 MiB
    kept = [0, 1]
    rows = np.ones((size - len(kept), width), np.float32)
    made = ColdRows(make_folder(tmp_path / "large", kept, size, cold_rows=save({"embedding": rows})))
    before = memory().file
    for start in range(8):
        made.embedding(made.cold_ids[start::64])
    assert memory().file - before < rows.nbytes / 8
