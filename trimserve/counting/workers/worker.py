"""A process that counts: reads a job, then slices, from stdin; writes blocks to stdout."""

import contextlib
import signal
import sys

from trimserve.counting.workers import wire


def main() -> None:
    """Count until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    with contextlib.suppress(EOFError):
        job = wire.read_job(wire.receive(requests))
        encoder = job.make_encoder()
        while True:
            piece = wire.read_slice(wire.receive(requests))
            wire.send(answers, wire.answer(job, piece, encoder))


if __name__ == "__main__":
    main()
