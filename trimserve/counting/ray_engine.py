"""Count slices with Ray Data, on the machines of a cluster."""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from trimserve.corpus import Slice
from trimserve.counting.blocks import Block, OnBytes, ignore
from trimserve.counting.job import Job
from trimserve.errors import require


def count_ray(
    job: Job, slices: Sequence[Slice], workers: int | None, on_bytes: OnBytes = ignore
) -> Generator[tuple[int, Block]]:
    """Count slices on a Ray cluster; the files have to lie under the same paths on every machine.

    A slice whose worker dies is counted again by another one; Ray gives each result once.

    Args:
        job: how to count.
        slices: what to count.
        workers: how many count at the same time; None leaves it to Ray.
        on_bytes: called with the number of further bytes that were read.

    Yields:
        The number of each slice and its block, in the order that they come.

    Raises:
        MissingExtraError: Ray is not installed.
        TrimserveError: a slice cannot be read.
    """
    ray = require("ray", extra="ray", purpose="--engine ray")
    data = require("ray.data", extra="ray", purpose="--engine ray")
    if not ray.is_initialized():
        ray.init(logging_level="ERROR", log_to_driver=False)  # RAY_ADDRESS names a cluster
    data.DataContext.get_current().enable_progress_bars = False
    shared_job = ray.put(job)
    rows = [{"number": number, "piece": piece} for number, piece in enumerate(slices)]
    blocks = data.from_items(rows, override_num_blocks=len(rows)).map(
        _CountSlice, fn_constructor_args=(shared_job,), concurrency=workers or (1, max(len(rows), 1))
    )
    for row in blocks.iter_rows():
        if isinstance(row["error"], Exception):
            raise row["error"]
        yield row["number"], row["block"]
        on_bytes(slices[row["number"]].bytes)


class _CountSlice:
    """An actor: loads the tokenizer once, then counts one slice after the other."""

    def __init__(self, job: Any) -> None:  # noqa: ANN401 - an ObjectRef
        self._job: Job = require("ray", extra="ray", purpose="--engine ray").get(job)
        self._encoder = self._job.make_encoder()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from trimserve.errors import TrimserveError

        number = int(np.asarray(row["number"]))
        try:
            return {"number": number, "block": self._job.count(row["piece"], self._encoder), "error": None}
        except (TrimserveError, OSError) as error:
            return {"number": number, "block": None, "error": error}
