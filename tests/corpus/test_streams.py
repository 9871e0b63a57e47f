"""Compressed files: whole or refused, and never more memory than a block."""

import gzip
import io
import random
import tracemalloc

import pytest

from trimserve.corpus.streams import MAX_WINDOW, Section, open_section
from trimserve.errors import UsageError

DATA = random.Random(1).randbytes(3000) + b"the cat sat on the mat\n" * 20_000
SKIPPED = (0x184D2A53).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"hello"


def read(content: bytes, compression: str) -> bytes:
    return open_section(Section(io.BytesIO(content)), compression, f"x{compression}").read()


def zst(content: bytes, **options) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor(**options).compress(content)


@pytest.mark.parametrize(
    "options",
    [{}, {"write_checksum": True}, {"write_content_size": False}, {"level": 19}, {"write_dict_id": False}],
)
def test_frames_of_every_kind_are_followed(options):
    frame = zst(DATA, **options)
    assert read(frame, ".zst") == DATA
    assert read(SKIPPED + frame + SKIPPED + zst(b"") + frame, ".zst") == 2 * DATA
    stream = pytest.importorskip("zstandard").ZstdCompressor(**options).compressobj()
    assert read(stream.compress(DATA[:5000]) + stream.flush(), ".zst") == DATA[:5000]


def test_members_and_padding_of_gzip_are_read():
    member = gzip.compress(DATA)
    assert read(member + gzip.compress(b"") + member, ".gz") == 2 * DATA
    assert read(member + bytes(100_000), ".gz") == DATA
    assert read(member + bytes(70_000) + member, ".gz") == 2 * DATA


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_an_early_end_is_refused_wherever_it_is(compression):
    text = DATA[:700]
    frames = [gzip.compress(text), gzip.compress(b"b")] if compression == ".gz" else [zst(text), zst(b"b")]
    content = b"".join(frames)
    for end in range(len(content)):
        if end == len(frames[0]):
            assert read(content[:end], compression) == text  # whole, as far as anyone can know
            continue
        with pytest.raises(UsageError, match=rf"x{compression} (is empty|ends early, at byte {end:,},)"):
            read(content[:end], compression)
    for garbage in (b"x", b"\x1f", b"garbage", b"PK\x03\x04" * 5):
        with pytest.raises(UsageError, match=rf"x{compression} "):
            read(content + garbage, compression)


def test_damage_names_the_file_and_the_place():
    content = bytearray(zst(DATA, write_checksum=True))
    content[-1] ^= 1
    with pytest.raises(UsageError, match=r"x\.zst is no whole zstd file, near byte .*checksum"):
        read(bytes(content), ".zst")
    content = bytearray(gzip.compress(DATA))
    content[-6] ^= 1
    with pytest.raises(UsageError, match=r"x\.gz is no whole gzip file, behind byte .*incorrect data check"):
        read(bytes(content), ".gz")


def test_a_window_beyond_the_limit_is_refused_before_it_is_taken():
    frame = (0xFD2FB528).to_bytes(4, "little") + bytes([0, 18 << 3]) + bytes(20)  # 2^28
    with pytest.raises(UsageError, match="takes 256 MiB to decompress, the limit is 128 MiB"):
        read(frame, ".zst")
    assert MAX_WINDOW == 1 << 27


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_bomb_takes_a_block_at_a_time(compression):
    size = 1 << 26
    content = gzip.compress(bytes(size), 9) if compression == ".gz" else zst(bytes(size))
    stream = open_section(Section(io.BytesIO(content)), compression, "x")
    tracemalloc.start()
    found = 0
    while block := stream.read(1 << 20):
        found += len(block)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == size
    assert peak < 1 << 23
