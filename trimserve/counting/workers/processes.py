"""Count slices in processes of this machine."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import IO, Self, cast

from trimserve.corpus.slices import Slice
from trimserve.counting.encoding.encoders import IdEncoder
from trimserve.counting.slice_counts import OnBytes, SliceCounts, ignore
from trimserve.counting.workers import wire
from trimserve.counting.workers.job import Job
from trimserve.errors import TrimserveError

# A process costs a second to start; its share of the corpus should take longer than that.
BYTES_A_PROCESS = {"fastokens": 1 << 28, "words": 1 << 25, "tokenizers": 1 << 23}


def count_local(
    job: Job, encoder: IdEncoder, slices: Sequence[Slice], workers: int, on_bytes: OnBytes = ignore
) -> Generator[tuple[int, SliceCounts]]:
    """Count slices, in this process if there is little to do.

    Args:
        job: how to count.
        encoder: the job's, for slices that are counted in this process.
        slices: what to count.
        workers: processes at most; the tokenizer's own threads are limited by its library.
        on_bytes: called with the number of further bytes that were read.

    Yields:
        The number of each slice and its block, in the order that they are done.

    Raises:
        TrimserveError: a slice cannot be read; or a process ended by itself.
    """
    total = sum(piece.bytes for piece in slices)
    processes = min(workers, len(slices), total // BYTES_A_PROCESS[job.engine])
    if processes < 2:
        yield from _count_here(job, encoder, slices, on_bytes)
    else:
        yield from _count_in_processes(job, slices, processes, on_bytes)


def _count_here(
    job: Job, encoder: IdEncoder, slices: Sequence[Slice], on_bytes: OnBytes
) -> Generator[tuple[int, SliceCounts]]:
    for number, piece in enumerate(slices):
        done = 0

        def further(count: int) -> None:
            nonlocal done
            on_bytes(count - done)
            done = count

        yield number, job.count(piece, encoder, further)
        further(piece.bytes)


def _count_in_processes(
    job: Job, slices: Sequence[Slice], processes: int, on_bytes: OnBytes
) -> Generator[tuple[int, SliceCounts]]:
    """A thread waits for each process; blocks are yielded here as they come."""
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_Process(job)) for _ in range(processes)]
        pool = stack.enter_context(ThreadPoolExecutor(processes))
        # Entered last, so left first: processes end, then the threads that wait for them.
        for worker in workers:
            stack.callback(worker.kill)
        idle = list(workers)
        waiting = iter(enumerate(slices))
        running: dict[Future[SliceCounts], tuple[int, _Process]] = {}
        while True:
            for worker, (number, piece) in zip(list(idle), waiting, strict=False):
                running[pool.submit(worker.ask, piece)] = (number, worker)
                idle.remove(worker)
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, worker = running.pop(future)
                idle.append(worker)
                yield number, future.result()
                on_bytes(slices[number].bytes)


_WORKER = "trimserve.counting.workers.worker"


class _Process:
    """A process that counts the slices it is sent, one at a time.

    Not `multiprocessing`: that imports the user's main module again, which a script without a guard does not
    survive.
    """

    def __init__(self, job: Job) -> None:
        command = [sys.executable, "-m", _WORKER]
        # One thread each: the processes share the cores. Ctrl-C is the parent's to handle.
        environment = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process: subprocess.Popen[bytes] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        # Both are pipes, by the arguments above.
        self._stdin, self._stdout = (
            cast(IO[bytes], self._process.stdin),
            cast(IO[bytes], self._process.stdout),
        )
        self._lock = threading.Lock()
        self._send(wire.job_message(job))

    def ask(self, piece: Slice) -> SliceCounts:
        """Send a slice and wait for its block."""
        with self._lock:
            self._send(wire.slice_message(piece))
            try:
                answer = wire.receive(self._stdout)
            except EOFError as error:
                code = self._process.wait()
                raise TrimserveError(
                    f"a worker process ended with code {code} while it counted {piece.file.name}: check the "
                    "memory, or use fewer --workers."
                ) from error
        return wire.read_block(answer)

    def _send(self, message: wire.Message) -> None:
        with contextlib.suppress(BrokenPipeError):  # the answer that is missing says so
            wire.send(self._stdin, message)

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()
