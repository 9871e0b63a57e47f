"""A process that counts: reads a job, then slices, from stdin; writes blocks to stdout."""

import contextlib
import signal
import sys
from typing import TextIO, cast

from trimserve.counting.workers import wire
from trimserve.interrupts import SIGNALS
from trimserve.stdout import data_only, data_stream


def main() -> None:
    """Count until stdin ends."""
    for number in SIGNALS:  # the parent's to handle, which then ends its workers
        signal.signal(number, signal.SIG_IGN)
    # Not by file descriptor 1: loading a tokenizer may print to it.
    with data_only(restore=False), contextlib.suppress(EOFError):
        requests, answers = sys.stdin.buffer, cast(TextIO, data_stream()).buffer
        job = wire.read_job(wire.receive(requests))
        encoder = job.make_encoder()
        while True:
            piece = wire.read_slice(wire.receive(requests))
            wire.send(answers, wire.answer(job, piece, encoder))


if __name__ == "__main__":
    main()
