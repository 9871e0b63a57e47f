"""Notes of Rust panics are taken out of what native code prints; everything else comes through."""

import json
import os
import random
import subprocess
import sys

import pytest

from trimserve.cli.native_stderr import PanicFilter

NEW = b"\nthread '<unnamed>' (71) panicked at /x/lib.rs:3:4:\nrange end index 5\n"
HINT = b"note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace\n"
OLD = b"thread 'main' panicked at 'no', /x/lib.rs:3:4\n"
OTHERS = b"\n\nfirst\n\nnote: run it again\nthread 'x' is busy\n 50%|##\r100%|####\n\nlast"


@pytest.mark.parametrize("note", [NEW, NEW + HINT, OLD + HINT, OLD, NEW + HINT + NEW])
def test_notes_are_left_out_however_the_bytes_come(note):
    rng = random.Random(1)
    for _ in range(200):
        stream, panics, given = b"before\n" + note + OTHERS, PanicFilter(), b""
        while stream:
            size = rng.randrange(1, 40)
            given += panics.feed(stream[:size])
            stream = stream[size:]
        assert given + panics.flush() == b"before\n" + OTHERS


def test_an_unfinished_line_does_not_wait():
    panics = PanicFilter()
    assert panics.feed(b" 50%|##") == b" 50%|##"
    assert panics.feed(b"\r60%") == b"\r60%"
    assert panics.feed(b"thread '<unnamed>' panicked at 'x'\n") == b"thread '<unnamed>' panicked at 'x'\n"


PROGRAM = """
import os, sys
from trimserve.cli.native_stderr import hide_panics
hide_panics()
from tokenizers import Tokenizer
os.write(2, b"native\\n")
try:
    Tokenizer.from_str(sys.argv[1])
except BaseException as error:
    print(type(error).__name__, file=sys.stderr)
os.write(2, b"last words")
os.abort()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_program_that_panics_and_dies():
    model = {"type": "WordLevel", "vocab": {}, "unk_token": "a"}
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    bad = json.dumps({"version": "1.0", "added_tokens": [], "model": model, "normalizer": charsmap})
    environment = os.environ | {"RUST_BACKTRACE": "1"}
    run = [sys.executable, "-c", PROGRAM, bad]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert sorted(done.stderr.split("\n")) == ["PanicException", "last words", "native"]
    loud = subprocess.run(run, capture_output=True, text=True, env=environment | {"TRIMSERVE_DEBUG": "1"})
    assert "panicked at" in loud.stderr
