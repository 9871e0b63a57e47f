import struct

import numpy as np
import pytest

from tests.support.gguf_files import Tensor, Written, random_tensor, string
from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.files.gguf import read_gguf


@pytest.fixture
def written():
    tokens = ["a", "é", "", "▁the"]
    metadata = [
        ("general.architecture", "llama"),
        ("count", 7),
        ("share", 0.5),
        ("flag", True),
        ("tokens", tokens),
        ("types", np.array([1, 3, 6, -2])),
        ("scores", np.array([0.5, -1.0], np.float32)),
        ("flags", np.array([True, False])),
    ]
    tensors = [
        random_tensor("a.weight", "Q4_K", (3, 256)),
        random_tensor("b.weight", "F32", (5,), seed=1),
        random_tensor("c.weight", "Q8_0", (2, 3, 64), seed=2),
    ]
    return Written(metadata, tensors)


def test_metadata_and_places_are_read(written, tmp_path):
    found = read_gguf(written.write(tmp_path / "m.gguf"))
    assert found.version == 3
    assert found.text("general.architecture") == "llama"
    assert (found.integer("count"), found.number("share"), found.flag("flag", False)) == (7, 0.5, True)
    assert found.texts("tokens") == ["a", "é", "", "▁the"]
    assert found.numbers("types", 4).tolist() == [1, 3, 6, -2]
    assert found.numbers("scores", 2).tolist() == [0.5, -1.0]
    assert found.numbers("flags", 2).tolist() == [True, False]
    assert (found.integer("absent", 3), found.text("absent", "x"), found.flag("absent", True)) == (
        3,
        "x",
        True,
    )
    content = (tmp_path / "m.gguf").read_bytes()
    for tensor in written.tensors:
        place = found.tensors[tensor.name]
        assert content[place.offset : place.offset + place.nbytes] == tensor.data
        assert place.shape == tuple(reversed(tensor.sizes))


def test_rows_are_read_alone(written, tmp_path):
    tensor = read_gguf(written.write(tmp_path / "m.gguf")).tensors["a.weight"]
    whole = tensor.floats()
    assert whole.shape == (3, 256)
    assert np.array_equal(tensor.floats(np.array([2, 0])), whole[[2, 0]])
    assert np.array_equal(tensor.floats(slice(1, 2)), whole[1:2])


def test_a_file_of_the_gguf_package_is_read(tmp_path):
    gguf = pytest.importorskip("gguf", reason="reads a file of the gguf package (pip install gguf)")
    rng, q8_0 = np.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    matrix = rng.standard_normal((6, 64), np.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_token_list(["x", "y"])
    writer.add_add_bos_token(True)
    writer.add_uint64("big", 1 << 40)
    writer.add_tensor("f", matrix)
    writer.add_tensor("q", gguf.quantize(matrix, q8_0), raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "m.gguf")
    assert found.integer("big") == 1 << 40
    assert found.flag("tokenizer.ggml.add_bos_token", False)
    assert np.array_equal(found.tensors["f"].floats(), matrix)
    expected = gguf.dequantize(gguf.quantize(matrix, q8_0), q8_0)
    assert np.array_equal(found.tensors["q"].floats(), expected)


def one(**changes):
    data = bytes(128)
    return Written(tensors=[Tensor("t", "F32", (32,), data, **changes)])


# What is wrong in a file, and what the message has to say.
BROKEN = {
    "another format": (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "a version of the future": (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
    "nothing after the magic": (b"GGUF", "ends within its header"),
    "more tensors than bytes": (Written(tensor_count=1 << 40), "1,099,511,627,776 tensors"),
    "more keys than bytes": (Written(key_count=1 << 63), "metadata keys"),
    "a string beyond the file": (Written(raw={"k": struct.pack("<IQ", 8, 1 << 60)}), "string of"),
    "a key beyond the file": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 50) + bytes(20), "string of"),
    "an array beyond the file": (Written(raw={"k": struct.pack("<IIQ", 9, 4, 1 << 40)}), "numbers of 'k'"),
    "strings beyond the file": (Written(raw={"k": struct.pack("<IIQ", 9, 8, 1 << 20)}), "strings of 'k'"),
    "arrays in arrays": (Written(raw={"k": struct.pack("<IIQII", 9, 9, 1, 9, 9)}), "array of arrays"),
    "an unknown type": (Written(raw={"k": struct.pack("<IQ", 77, 0)}), "unknown type 77"),
    "an unknown type in an array": (Written(raw={"k": struct.pack("<IIQQ", 9, 77, 1, 0)}), "type 77"),
    "a truth value of 2": (Written(raw={"k": struct.pack("<IB", 7, 2)}), "true or false"),
    "bytes that are not UTF-8": (Written([("k", b"\xff\xfe")]), "UTF-8"),
    "a key twice": (Written([("k", 1), ("k", 2)]), "'k' twice"),
    "a tensor twice": (Written(tensors=one().tensors * 2), "'t' twice"),
    "no dimension": (Written(tensors=[Tensor("t", "F32", (), b"")]), "0 dimensions"),
    "five dimensions": (Written(tensors=[Tensor("t", "F32", (1,) * 5, bytes(4))]), "5 dimensions"),
    "a size of 0": (Written(tensors=[Tensor("t", "F32", (4, 0), b"")]), "cannot be F32"),
    "half a block": (Written(tensors=[Tensor("t", "Q8_0", (16,), bytes(34))]), "cannot be Q8_0"),
    "sizes whose product overflows": (
        Written(tensors=[Tensor("t", "F32", (1 << 32, 1 << 32, 1 << 32), bytes(32))]),
        "cut off",
    ),
    "an unknown format": (one(code=99), "format number 99"),
    "an offset beyond the file": (one(offset=1 << 40), "cut off"),
    "an unaligned offset": (one(offset=4), "unaligned"),
    "an alignment of 0": (Written([("general.alignment", 0)]), "power of two"),
    "an alignment of 48": (Written([("general.alignment", 48)]), "power of two"),
    "a huge alignment": (Written([("general.alignment", 1 << 30)]), "power of two"),
    "overlapping tensors": (
        Written(tensors=[*one().tensors, Tensor("u", "F32", (32,), bytes(128), offset=64)]),
        "'t' and 'u' overlap",
    ),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "an empty file": (b"", "is empty"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_refused_in_one_sentence(what, tmp_path):
    content, message = BROKEN[what]
    path = tmp_path / "m.gguf"
    path.write_bytes(content if isinstance(content, bytes) else content.to_bytes())
    with pytest.raises((MismatchError, UnsupportedModelError), match=message) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_was_cut_off_is_refused_wherever_it_ends(written, tmp_path):
    content = written.to_bytes()
    path = tmp_path / "m.gguf"
    last = len(written.tensors[-1].data) % 32
    for end in range(0, len(content) - (32 - last if last else 0), 7):
        path.write_bytes(content[:end])
        with pytest.raises(MismatchError):
            read_gguf(path)


def test_a_value_of_another_type_is_named(tmp_path):
    metadata = [("a", "x"), ("b", True), ("c", 2), ("d", float("nan")), ("e", np.array([1, 2]))]
    found = read_gguf(Written(metadata).write(tmp_path / "m.gguf"))
    for ask, message in (
        (lambda: found.integer("a"), "a should be a whole number but is 'x'"),
        (lambda: found.integer("b"), "b should be a whole number"),
        (lambda: found.number("b"), "b should be a finite number"),
        (lambda: found.number("d"), "finite"),
        (lambda: found.flag("c", False), "c should be true or false"),
        (lambda: found.text("c"), "c should be a string"),
        (lambda: found.texts("e"), "e should be a list of strings but is 2 values"),
        (lambda: found.numbers("e", 3), "e should be 3 numbers but is 2 values"),
        (lambda: found.text("absent"), "has no absent"),
    ):
        with pytest.raises(MismatchError, match=message):
            ask()


def test_a_string_may_be_empty_and_long(tmp_path):
    long = "x" * 200_000
    found = read_gguf(Written([("a", ""), ("b", long)], raw={}).write(tmp_path / "m.gguf"))
    assert (found.text("a"), found.text("b")) == ("", long)
    assert string("") == bytes(8)
