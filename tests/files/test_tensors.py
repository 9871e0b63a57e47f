import errno
import json
import os
import struct
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.files import tensors as tensorfile
from trimserve.files.held import HeldFile
from trimserve.files.tensors import (
    ArrayTensor,
    TensorRows,
    WholeTensor,
    exhaust,
    map_tensor,
    read_header,
    to_float32,
    write_tensors,
)

V, H = 37, 5
MATRIX = np.arange(V * H, dtype=np.float32).reshape(V, H)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Specs of a matrix (V, H) and of the same with an axis of one before it."""
    path = tmp_path_factory.mktemp("tensors") / "m.safetensors"
    save_file({"matrix": MATRIX, "wide": MATRIX[None]}, path)
    return read_header(path)[0]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {"matrix": MATRIX, "bias": np.arange(V, dtype=np.float16), "scalar": np.array(7, np.int64)}
    arrays["none"] = np.zeros((0, H), np.float32)
    save_file(arrays, path, {"format": "pt"})
    return path


@dataclass
class Stored:
    """Bytes under any safetensors dtype, bfloat16 included."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def write_to(self, file):
        yield file.write(self.data)


def written(source, folder) -> bytes:
    """The bytes that a source streams into a file."""
    path = folder / "written"
    with path.open("wb", buffering=0) as file:
        counts = list(source.write_to(file))
    assert sum(counts) == path.stat().st_size
    return path.read_bytes()


def raw(header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def test_header_tells_where_each_tensor_lies(file):
    specs, metadata = read_header(file)
    assert metadata == {"format": "pt"}
    content = file.read_bytes()
    for name, array in load_file(file).items():
        spec = specs[name]
        assert (spec.shape, spec.nbytes) == (array.shape, array.nbytes)
        assert content[spec.offset : spec.offset + spec.nbytes] == array.tobytes()


def test_mapped_tensors_equal_what_safetensors_loads(file):
    specs, _ = read_header(file)
    for name, array in load_file(file).items():
        mapped = map_tensor(specs[name])
        assert np.array_equal(mapped, array)
        assert not mapped.flags.writeable or mapped.size == 0


def test_bfloat16_converts_exactly():
    values = np.array([1.0, -2.5, 2.0**100, 2.0**-133, np.inf, 0.0], np.float32)  # with a subnormal
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    assert np.array_equal(to_float32(bits, "BF16"), values)
    half = np.array([0.1, 65504], np.float16)
    assert np.array_equal(to_float32(half, "F16"), half.astype(np.float32))
    assert to_float32(MATRIX, "F32") is MATRIX


@pytest.mark.parametrize("dtype", ["F32", "BF16", "I64", "U8", "BOOL"])
def test_streamed_file_is_read_by_safetensors(tmp_path, dtype):
    size = tensorfile.STORAGE_DTYPES[dtype].itemsize
    data = bytes(np.arange(V * size, dtype=np.uint8) % 2)
    path = tmp_path / "b.safetensors"
    sources = {"x": Stored(dtype, (V,), data), "empty": Stored(dtype, (0, 3), b"")}
    assert exhaust(write_tensors(path, sources, {"kind": "test"})) == V * size
    with safe_open(path, "numpy") as opened:
        assert opened.metadata() == {"kind": "test"}
        assert opened.get_slice("x").get_shape() == [V]
        assert opened.get_slice("empty").get_shape() == [0, 3]
    assert read_header(path)[0]["x"].offset % 8 == 0
    assert written(WholeTensor(read_header(path)[0]["x"]), tmp_path) == data


def test_whole_tensor_is_copied_the_same_without_the_kernels_help(tmp_path, file, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    monkeypatch.setattr(tensorfile, "CHUNK_BYTES", 7)
    for name, array in load_file(file).items():
        assert written(WholeTensor(read_header(file)[0][name]), tmp_path) == array.tobytes()


def test_arrays_in_memory_are_written_as_safetensors_would(tmp_path):
    arrays = {"a": MATRIX[::2], "b": np.arange(3, dtype=np.int64), "c": np.array([True, False])}
    path = tmp_path / "c.safetensors"
    exhaust(write_tensors(path, {name: ArrayTensor(array) for name, array in arrays.items()}))
    for name, array in load_file(path).items():
        assert np.array_equal(array, arrays[name])
        assert array.dtype == arrays[name].dtype
    with pytest.raises(ValueError, match="complex128"):
        _ = ArrayTensor(np.zeros(1, complex)).dtype


@given(st.sets(st.integers(0, V - 1)), st.integers(1, 200))
def test_rows_come_in_order_whatever_the_block(stored, ids, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorfile, "CHUNK_BYTES", block)
        rows = np.array(sorted(ids), np.int32)
        source = TensorRows(stored["matrix"], rows)
        assert source.shape == (len(ids), H)
        assert written(source, stored["matrix"].path.parent) == MATRIX[rows].tobytes()


def test_rows_along_a_later_axis(stored):
    rows = np.array([0, 5, 36])
    source = TensorRows(stored["wide"], rows, axis=1)
    assert source.shape == (1, 3, H)
    assert written(source, stored["matrix"].path.parent) == MATRIX[rows].tobytes()
    with pytest.raises(ValueError, match="not a row axis"):
        TensorRows(stored["matrix"], rows, axis=1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 10**12) + b"{}",
        raw(b"{not json"),
        raw([]),
        raw(b'"text"'),
        raw({"x": 3}),
        raw({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        raw({"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"1234"),
        raw({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"123"),
        raw({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345"),
        raw({"__metadata__": 3}),
        raw({"__metadata__": {"x": 3}}),
        # Products that wrap to 0 and to 4 in 64 bits.
        raw({"x": {"dtype": "U8", "shape": [1 << 33, 1 << 31], "data_offsets": [0, 0]}}),
        raw({"x": {"dtype": "U8", "shape": [(1 << 62) + 1, 4], "data_offsets": [0, 4]}}, b"1234"),
        raw({"x": {"dtype": "U8", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}),
        raw({"x": {"dtype": "U8", "shape": [-1, -4], "data_offsets": [0, 4]}}, b"1234"),
        raw({"x": {"dtype": "U8", "shape": [True, 4], "data_offsets": [0, 4]}}, b"1234"),
        raw({"x": {"dtype": "U8", "shape": [4.0], "data_offsets": [0, 4]}}, b"1234"),
        raw({"x": {"dtype": "U8", "shape": [1 << 80], "data_offsets": [0, 4]}}, b"1234"),
        raw({"x": {"dtype": "U8", "shape": [1] * 99 + [4], "data_offsets": [0, 4]}}, b"1234"),
        raw({"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 8]}}, b"1234"),
        raw({"x": {"dtype": "U8", "shape": [4], "data_offsets": [False, 4]}}, b"1234"),
        raw({"x": {"dtype": ["U8"], "shape": [4], "data_offsets": [0, 4]}}, b"1234"),
        # Two that overlap, and bytes that no tensor has, before, between and behind.
        raw({name: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for name in "xy"}, b"1234"),
        raw({"x": {"dtype": "U8", "shape": [4], "data_offsets": [1, 5]}}, b"12345"),
        # The sizes add up, and bytes 2 and 3 are nobody's.
        raw({name: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} for name in "xy"}, b"1234"),
        raw(
            {
                "x": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
                "y": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]},
            },
            b"12345",
        ),
        raw(b'{"x": {"dtype": "U8", "shape": [1e999], "data_offsets": [0, 4]}}', b"1234"),
        raw(b'{"x": 1, "x": 1}', b"1234"),
        raw(b"[" * 99_999, b""),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(MismatchError, match=r"bad\.safetensors"):
        read_header(path)


def test_tensors_in_any_order_and_without_bytes_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    entries = {
        "last": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]},
        "none": {"dtype": "F32", "shape": [0, 1 << 40], "data_offsets": [2, 2]},
        "first": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
    }
    path.write_bytes(raw(entries, b"abcd"))
    for source in (path, HeldFile(path)):
        specs = read_header(source)[0]
        assert list(specs) == list(entries)
        assert {name: bytes(map_tensor(spec)) for name, spec in specs.items()} == {
            "last": b"cd",
            "none": b"",
            "first": b"ab",
        }


def test_what_is_mapped_is_the_file_that_was_opened(file):
    expected = np.array(map_tensor(read_header(file)[0]["matrix"]))
    specs, _ = read_header(HeldFile(file))
    file.unlink()
    file.write_bytes(b"another")
    np.testing.assert_array_equal(map_tensor(specs["matrix"]), expected)


def test_a_number_format_that_is_not_read_is_no_damage(tmp_path):
    path = tmp_path / "quantised.safetensors"
    path.write_bytes(raw({"x": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}, b"1234"))
    with pytest.raises(UnsupportedModelError, match="x is stored as F4, a number format of quant"):
        read_header(path)


def test_truncation_anywhere_is_noticed(file):
    content = file.read_bytes()
    for length in range(0, len(content), 7):
        file.write_bytes(content[:length])
        with pytest.raises(MismatchError):
            read_header(file)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(file):
    spec = read_header(file)[0]["matrix"]
    file.write_bytes(file.read_bytes()[: spec.offset + 8])
    with pytest.raises(MismatchError, match="changed while being read"):
        exhaust(write_tensors(file.parent / "out.safetensors", {"matrix": WholeTensor(spec)}))
    with pytest.raises(MismatchError, match="changed while being read"):
        written(TensorRows(spec, np.array([V - 1])), file.parent)


def test_a_source_of_the_wrong_length_is_noticed(tmp_path):
    with pytest.raises(MismatchError, match="a source changed"):
        exhaust(write_tensors(tmp_path / "b.safetensors", {"x": Stored("F32", (3,), b"1234")}))
