"""GGUF files with bytes changed at random: each is read or refused, in memory that the file's size bounds."""

import json
import tracemalloc

import numpy as np
import pytest

from tests.support import tiny_tokenizers
from tests.support.counting import Counter
from tests.support.gguf_files import Written, random_tensor
from tests.support.gguf_models import tokenizer_fields
from trimserve.errors import TrimserveError
from trimserve.files.gguf import read_gguf
from trimserve.model.resolve import resolve_model

SEED = 16
CI_COUNT = 1_500
SLOW_COUNT = 10_000
MODEL_CI_COUNT = 150
MODEL_SLOW_COUNT = 500
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
    counter = Counter("changed GGUF files", SEED)
    for number in range(count):
        path.write_bytes(changed(content, rng))
        tracemalloc.start()
        try:
            found = read_gguf(path)
            for tensor in found.tensors.values():
                assert tensor.floats(slice(0, 1)).shape == (1, tensor.shape[-1])
            counter.add("read")
        except TrimserveError as error:
            counter.add("refused", fault="two lines" if "\n" in str(error) else None)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < MOST_BYTES, f"file {number} took {peak:,} bytes"
    counter.check()
    assert 0 < counter.kinds["read"] < count


def test_changed_files_are_read_or_refused(tmp_path):
    fuzz(CI_COUNT, tmp_path / "m.gguf")


@pytest.mark.fuzz
def test_many_changed_files_are_read_or_refused(tmp_path):
    fuzz(SLOW_COUNT, tmp_path / "m.gguf")


def llama():
    """A llama of one layer as its metadata and tensors; every value of the metadata can be replaced."""
    fields = tokenizer_fields(json.loads(tiny_tokenizers.byte_level_bpe(8).to_str()), pre="gpt-2")
    rows, width = len(fields["tokens"]), 32
    metadata = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.context_length": 64,
        "llama.embedding_length": width,
        "llama.block_count": 1,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10_000.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": fields["tokens"],
        "tokenizer.ggml.token_type": np.array(fields["types"], np.int32),
        "tokenizer.ggml.merges": fields["merges"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }
    shapes = {
        "attn_q": (width, width),
        "attn_k": (16, width),
        "attn_v": (16, width),
        "attn_output": (width, width),
    }
    shapes |= {"ffn_gate": (64, width), "ffn_up": (64, width), "ffn_down": (width, 64)}
    shapes |= {"attn_norm": (width,), "ffn_norm": (width,)}
    tensors = [
        random_tensor("token_embd.weight", "F32", (rows, width)),
        random_tensor("output_norm.weight", "F32", (width,)),
    ]
    tensors += [random_tensor(f"blk.0.{part}.weight", "F32", shape) for part, shape in shapes.items()]
    return metadata, tensors


# fmt: off
VALUES = (
    0, 1, 2, 3, 7, 2**31, 2**32 - 1, -1, True, False, 0.0, -1.0, 1e30, float("nan"), float("inf"), "",
    "llama", "qwen2", "gemma3", "phi3", "yarn", "none", "<0x00>", [], [""], ["a", "b"], np.array([1, 2]),
    np.array([], np.float32), np.array([float("nan")], np.float32),
)
# fmt: on


def fuzz_models(count, path):
    """Values of the metadata replaced, left out or added: a model is read, or refused in one sentence."""
    metadata, tensors = llama()
    rng, counter = np.random.default_rng(SEED), Counter("GGUF models with other metadata", SEED)
    for _ in range(count):
        changed = dict(metadata)
        for _ in range(rng.integers(1, 3)):
            key = list(changed)[rng.integers(0, len(changed))]
            value = VALUES[rng.integers(0, len(VALUES))]
            if isinstance(value, int) and not isinstance(value, bool) and value < 0:
                del changed[key]
            else:
                changed[key] = value
        Written(list(changed.items()), tensors).write(path)
        try:
            source = resolve_model(path)
            source.tokenizer().encode("The cat 🎉")
            assert source.vocab_size
            assert source.linear_widths()
            counter.add("read")
        except TrimserveError as error:
            counter.add("refused", fault="two lines" if "\n" in str(error) else None)
    counter.check()
    assert 0 < counter.kinds["read"] < count


def test_models_with_other_metadata_are_read_or_refused(tmp_path):
    fuzz_models(MODEL_CI_COUNT, tmp_path / "m.gguf")


@pytest.mark.fuzz
def test_many_models_with_other_metadata_are_read_or_refused(tmp_path):
    fuzz_models(MODEL_SLOW_COUNT, tmp_path / "m.gguf")
