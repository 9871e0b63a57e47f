"""Count slices with Ray Data, on the machines of a cluster."""

import logging
from collections.abc import Generator, Sequence
from typing import Any

from trimserve.corpus.slices import Slice
from trimserve.counting.slice_counts import OnBytes, SliceCounts, ignore
from trimserve.counting.workers import wire
from trimserve.counting.workers.job import Job
from trimserve.errors import TrimserveError, require
from trimserve.foreign import foreign

_RETRIES = 3


def count_ray(
    job: Job, slices: Sequence[Slice], workers: int | None, on_bytes: OnBytes = ignore
) -> Generator[tuple[int, SliceCounts]]:
    """Count slices on a Ray cluster; the files have to lie under the same paths on every machine.

    A slice whose worker dies is counted again by another one, a few times; Ray gives each result once.

    Args:
        job: how to count.
        slices: what to count.
        workers: how many count at the same time; None leaves it to Ray.
        on_bytes: called with the number of further bytes that were read.

    Yields:
        The number of each slice and its block, in the order that they come.

    Raises:
        MissingExtraError: Ray is not installed.
        TrimserveError: a slice cannot be read, or its workers die again and again.
    """
    if not slices:
        return
    ray = require("ray", extra="ray", purpose="--engine ray")
    data = require("ray.data", extra="ray", purpose="--engine ray")
    if not ray.is_initialized():
        with foreign(
            "Ray did not start", advice="see its log, or count with --engine local.", error=TrimserveError
        ):
            ray.init(logging_level="ERROR", log_to_driver=False)  # RAY_ADDRESS names a cluster
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    data.DataContext.get_current().enable_progress_bars = False
    shared_job = ray.put(wire.job_message(job).text)
    rows = [
        {"number": number, "slice": wire.slice_message(piece).text} for number, piece in enumerate(slices)
    ]
    most = min(workers or len(slices), len(slices))
    actors = data.ActorPoolStrategy(min_size=most if workers else 1, max_size=most)
    answers = data.from_items(rows, override_num_blocks=len(rows)).map(
        _CountSlice,
        fn_constructor_args=(shared_job,),
        compute=actors,
        # By default without end: a slice that takes more memory than there is would be tried for ever.
        ray_remote_args_fn=lambda: {"max_restarts": _RETRIES, "max_task_retries": _RETRIES},
    )
    found = iter(answers.iter_rows())
    while True:
        with foreign(
            "Ray could not count the corpus",
            advice="its workers may lack memory; see Ray's log, or count with --engine local.",
            error=TrimserveError,
        ):
            row = next(found, None)
        if row is None:
            return
        number = int(row["number"])
        yield number, wire.read_block(wire.Message(row["text"], row["arrays"]))
        on_bytes(slices[number].bytes)


class _CountSlice:
    """An actor: loads the tokenizer once, then counts one slice after the other."""

    def __init__(self, job: Any) -> None:  # noqa: ANN401 - an ObjectRef
        from trimserve.counting.encoding.encoders import limit_threads

        limit_threads(1)  # Ray gives it one core
        text = require("ray", extra="ray", purpose="--engine ray").get(job)
        self._job = wire.read_job(wire.Message(text))
        self._encoder = self._job.make_encoder()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        answer = wire.answer(self._job, wire.read_slice(wire.Message(row["slice"])), self._encoder)
        return {"number": row["number"], "text": answer.text, "arrays": answer.arrays}
