"""GGUF files with bytes changed at random: each is read or refused, in memory that the file's size bounds."""

import tracemalloc

import numpy as np
import pytest

from tests.support.gguf_files import Written, random_tensor
from trimserve.errors import TrimserveError
from trimserve.files.gguf import read_gguf

SEED = 16
CI_COUNT = 1_500
SLOW_COUNT = 100_000
MOST_BYTES = 2 << 20  # for a file of 4 KB
INTERESTING = (0, 1, 2, 7, 8, 9, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def model():
    metadata = [
        ("general.architecture", "llama"),
        ("general.alignment", 32),
        ("tokenizer.ggml.tokens", [f"t{index}" for index in range(40)]),
        ("tokenizer.ggml.scores", np.linspace(0, 1, 40, dtype=np.float32)),
        ("tokenizer.ggml.token_type", np.ones(40, np.int32)),
        ("flag", True),
    ]
    kinds = {"Q4_K": (2, 256), "Q8_0": (3, 64), "F32": (8,)}
    tensors = [random_tensor(kind.lower(), kind, shape) for kind, shape in kinds.items()]
    return Written(metadata, tensors).to_bytes()


def changed(content, rng):
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(0, len(data)))
        kind = rng.integers(0, 4)
        if kind == 0:
            data[place] = rng.integers(0, 256)
        elif kind == 1:  # a number of 4 or 8 bytes, at any place
            size = int(rng.choice((4, 8)))
            number = INTERESTING[rng.integers(0, len(INTERESTING))] % 256**size
            data[place : place + size] = number.to_bytes(size, "little")
        elif kind == 2:
            del data[place : place + int(rng.integers(1, 64))]
        else:
            data[place:place] = bytes(rng.integers(0, 256, int(rng.integers(1, 16)), dtype=np.uint8))
        if not data:
            break
    return bytes(data)


def fuzz(count, path):
    content, rng = model(), np.random.default_rng(SEED)
    read, sentences = 0, []
    for number in range(count):
        path.write_bytes(changed(content, rng))
        tracemalloc.start()
        try:
            found = read_gguf(path)
            for tensor in found.tensors.values():
                assert tensor.floats(slice(0, 1)).shape == (1, tensor.shape[-1])
            read += 1
        except TrimserveError as error:
            sentences.append(str(error))
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < MOST_BYTES, f"file {number} took {peak:,} bytes"
    print(f"{count:,} changed GGUF files (seed {SEED}): {read:,} read, {count - read:,} refused")
    assert not [sentence for sentence in sentences if "\n" in sentence]
    assert 0 < read < count


def test_changed_files_are_read_or_refused(tmp_path):
    fuzz(CI_COUNT, tmp_path / "m.gguf")


@pytest.mark.slow
def test_many_changed_files_are_read_or_refused(tmp_path):
    fuzz(SLOW_COUNT, tmp_path / "m.gguf")
