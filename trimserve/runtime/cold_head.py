"""The cold head: hidden states -> logits of the cold ids, by graphs over the mapped cold rows."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats, Ids
from trimserve.concurrency import Once, renew_in_child
from trimserve.errors import MismatchError
from trimserve.files.checked_json import convert_json, parse_json
from trimserve.files.held import HeldGraph
from trimserve.files.model_json import Rows
from trimserve.folder.names import COLD_BLOCKS_NAME, COLD_HEAD_NAME, COLD_MAX_NAME, COLD_WEIGHTS_NAME
from trimserve.folder.opening import TrimmedFolder
from trimserve.process import available_cpus
from trimserve.runtime.session import open_session

# Of a cold graph's metadata: a JSON list, how many cold rows each of its parts holds.
PARTS_KEY = "trimserve.parts"
Arrays = list[npt.NDArray[Any]]
T = TypeVar("T")


class PartedGraph:
    """A graph over the cold rows whose input `part` says which of them to work on.

    Each thread works on a part by itself, so that a row goes from the file through cast, product and maximum
    in one core's cache, and threads meet once a product and not once an operator.
    """

    def __init__(
        self, graph: Path | HeldGraph, rows: int | None = None, *, threads: int | None, packed: bool
    ) -> None:
        """Open a graph.

        Args:
            graph: the graph with its data.
            rows: cold rows of all its parts, where that is known.
            threads: at most so many parts at a time.
            packed: its rows are quantised: then it is one part, with threads of its own.

        Raises:
            MismatchError: it was not made for these rows.
        """
        path = graph if isinstance(graph, Path) else graph.path
        threads = threads or available_cpus()
        # Without prepacking, or each float matrix would have a private copy. Packed rows are in the file, and
        # used where they lie if this is on.
        self._session = open_session(graph, threads=threads if packed else 1, prepack=packed)
        metadata = self._session.get_modelmeta().custom_metadata_map
        if PARTS_KEY not in metadata:
            raise MismatchError(
                f"{path} was written by another version of trimserve: export the model again, or use compact "
                "mode."
            )
        origin, advice = f"the entry {PARTS_KEY} of {path}", "export the folder again."
        found = parse_json(metadata[PARTS_KEY], origin, advice=advice)
        sizes = convert_json(found, list[Rows], origin, advice=advice)
        if rows is not None and sum(sizes) != rows:
            raise MismatchError(
                f"{path} is of {sum(sizes):,} cold rows, the folder has {rows:,}: export it again."
            )
        self._parts = [slice(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]
        self._threads = min(threads, len(self._parts))
        # Its threads start with the first product, and again in a forked child, which has none of them.
        self._pool: Once[ThreadPoolExecutor] = Once()
        renew_in_child(self)

    def each(self, names: list[str], hidden: npt.NDArray[Any], use: Callable[[slice, Arrays], T]) -> list[T]:
        """Run every part and pass its outputs on, with the cold rows it holds; results in the parts' order.

        `use` is called in the thread that ran the part.
        """
        feeds: dict[str, Any] = {"hidden_states": np.ascontiguousarray(hidden)}
        if len(self._parts) == 1:
            return [use(self._parts[0], self._session.run(names, feeds))]

        def run(number: int) -> T:
            part = np.array(number, np.int64)
            return use(self._parts[number], self._session.run(names, {**feeds, "part": part}))

        numbers = range(len(self._parts))
        if self._threads == 1:
            return list(map(run, numbers))
        return list(self._pool.get(self._start_threads).map(run, numbers))

    def renew(self) -> None:
        """See `Renewable`."""
        self._pool = Once()

    def _start_threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, "trimserve-cold")


class ColdHead:
    """The cold rows as a matrix.

    Two graphs over the same mapped bytes, tile after tile, so that nothing but the tiles at work is in
    memory.
    """

    def __init__(self, folder: TrimmedFolder, *, threads: int | None = None) -> None:
        self.cold_ids: Ids = folder.vocab.head.cold_ids
        packed = not folder.manifest.files.keys().isdisjoint((COLD_BLOCKS_NAME, COLD_WEIGHTS_NAME))
        rows = self.cold_ids.size
        self._maxima = PartedGraph(folder.graph(COLD_MAX_NAME), rows, threads=threads, packed=packed)
        self._logits = PartedGraph(folder.graph(COLD_HEAD_NAME), rows, threads=threads, packed=packed)

    def maxima(self, hidden: Floats) -> tuple[Floats, Ids]:
        """The largest cold logit of each hidden state and its token id (the lowest on a tie).

        Args:
            hidden: (N, H), in the graph's dtype.

        Returns:
            float32 (N,) and int32 (N,).
        """
        parts = self._maxima.each(["maximum", "row"], hidden, lambda _, outputs: outputs)
        values, rows = (np.concatenate(tiles) for tiles in zip(*parts, strict=True))
        tile = values.argmax(axis=0)  # tiles are in id order: the first is the lowest id
        step = np.arange(values.shape[1])
        return values[tile, step].astype(np.float32, copy=False), self.cold_ids[rows[tile, step]]

    def logits(self, hidden: Floats) -> Floats:
        """Logits of all cold ids: (N, H) -> float32 (N, V - K)."""
        logits = np.empty((len(hidden), self.cold_ids.size), np.float32)

        def write(rows: slice, outputs: Arrays) -> None:
            logits[:, rows] = outputs[0].T

        self._logits.each(["logits"], hidden, write)
        return logits
