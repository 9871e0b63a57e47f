import asyncio
import errno

import pytest
from tokenizers import Tokenizer

from trimserve.errors import MismatchError, TrimserveError, UsageError
from trimserve.foreign import foreign, is_panic, reason


def raising(error):
    with foreign("x.bin cannot be read", advice="fetch it again."):
        raise error


def test_becomes_one_sentence():
    with pytest.raises(MismatchError, match=r"^x\.bin cannot be read \(odd\): fetch it again\.$"):
        raising(RuntimeError("\n odd.\nsecond line"))


def test_an_error_without_words_is_named_by_its_class():
    with pytest.raises(MismatchError, match=r"\(ZeroDivisionError\)"):
        raising(ZeroDivisionError())


def test_an_os_error_without_a_number_keeps_its_reason():
    with pytest.raises(MismatchError, match=r"\(bad magic\)"):
        raising(OSError("bad magic"))


def test_a_lack_of_memory_says_so():
    with pytest.raises(TrimserveError, match="out of memory"):
        raising(MemoryError())


@pytest.mark.parametrize(
    "said",
    ["Failed to allocate memory for requested buffer of size 9", "std::bad_alloc", "CUDA out of memory."],
)
def test_a_lack_of_memory_is_known_by_what_libraries_call_it(said):
    with (
        pytest.raises(TrimserveError, match=r"^it fails \(out of memory\): take less\.$") as caught,
        foreign("it fails", advice="fetch it again.", memory="take less."),
    ):
        raise RuntimeError(said)
    assert type(caught.value) is TrimserveError


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(3),
        GeneratorExit(),
        asyncio.CancelledError(),
        UsageError("ours"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_passes_unchanged(error):
    with pytest.raises(type(error)) as caught:
        raising(error)
    assert caught.value is error


def test_a_panic_of_rust_code_is_caught():
    bad = '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, '
    bad += '"unk_token": "a"}, '
    bad += '"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}'
    with (
        pytest.raises(MismatchError) as caught,
        foreign("t.json cannot be read as a tokenizer", advice="fetch it again."),
    ):
        Tokenizer.from_str(bad)
    assert is_panic(caught.value.__cause__)


def test_long_reasons_are_cut():
    assert len(reason(ValueError("x" * 10_000))) < 400
