import numpy as np
import pytest

from trimserve.errors import UnsupportedModelError
from trimserve.files.ggml_blocks import DEQUANTIZED, GGML_TYPES, dequantize_blocks

CODES = {kind.name: code for code, kind in GGML_TYPES.items()}
gguf = pytest.importorskip("gguf", reason="compares with the gguf package (pip install gguf)")


def test_every_format_takes_the_bytes_that_the_gguf_package_says():
    known = {code.value: sizes for code, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {code: (kind.numbers, kind.nbytes) for code, kind in GGML_TYPES.items()} == known
    assert all(gguf.GGMLQuantizationType(code).name == kind.name for code, kind in GGML_TYPES.items())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", DEQUANTIZED)
def test_numbers_are_those_of_the_gguf_package_to_the_bit(name):
    kind = GGML_TYPES[CODES[name]]
    # Any bytes are a block: all integers, scales of every size, infinities and NaN among them.
    blocks = np.random.default_rng(0).integers(0, 256, (3000, kind.nbytes), np.uint8)
    ours = dequantize_blocks(blocks, kind)
    theirs = gguf.dequantize(blocks, gguf.GGMLQuantizationType(CODES[name])).reshape(ours.shape)
    assert ours.dtype == np.float32
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_blocks_of_nothing_are_no_numbers():
    for name in DEQUANTIZED:
        kind = GGML_TYPES[CODES[name]]
        assert dequantize_blocks(np.empty((0, kind.nbytes), np.uint8), kind).shape == (0, kind.numbers)


def test_other_formats_are_refused_by_name():
    kind = GGML_TYPES[CODES["IQ2_XS"]]
    with pytest.raises(UnsupportedModelError, match=r"IQ2_XS.*Q4_K.*another quantisation"):
        dequantize_blocks(np.zeros((1, kind.nbytes), np.uint8), kind)
