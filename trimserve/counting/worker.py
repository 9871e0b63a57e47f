"""A process of `trimserve.counting.local`: reads a job, then slices, from stdin; writes blocks to stdout."""

import contextlib
import pickle
import signal
import sys

from trimserve.counting.job import Job
from trimserve.errors import TrimserveError


def main() -> None:
    """Count until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    with contextlib.suppress(EOFError):
        job: Job = pickle.load(requests)
        encoder = job.make_encoder()
        while True:
            piece = pickle.load(requests)
            try:
                answer: object = job.count(piece, encoder)
            except (TrimserveError, OSError) as error:
                answer = error
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()


if __name__ == "__main__":
    main()
