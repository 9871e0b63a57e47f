"""One process of the certificate's benchmark: products, or answers whose checks find no cached page.

Without ``--products`` it answers requests, a line of JSON each, as `bench.decode.worker` does, with the cold
files dropped from the page cache before each check; the time of dropping is not counted.
"""

import argparse
import ctypes
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimserve.exact.checker import ExactChecker
from trimserve.exact.sketch import Sketch
from trimserve.folder.names import COLD_NAME, SKETCH_DATA_NAME
from trimserve.generation.generator import Generator
from trimserve.loading import load
from trimserve.runtime.cold_head import ColdHead
from trimserve.runtime.session import open_session

SIZES = (1, 4, 16, 32)
_REPEATS = 11


def drop_pages(files: Sequence[Path]) -> None:
    """Take files out of this process's page tables and of the system's page cache (Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = {str(path.resolve()) for path in files}
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(.+)", line)
        if found and found[3] in names:
            start, end = int(found[1], 16), int(found[2], 16)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 4)  # MADV_DONTNEED
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def products(
    folder: Path, head: Path, coarse: Path, threads: int, *, drop: bool
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of the products in this process: kind -> number of hidden states -> one a repeat."""
    model, other = _load(folder, threads), _load(coarse, threads)
    hidden = np.random.default_rng(0).standard_normal((SIZES[-1], model._decoder.hidden_size), np.float32)
    hidden = hidden.astype(model._decoder.dtype)
    kinds: dict[str, Callable[[np.ndarray], Any]] = {
        "cold": ColdHead(model.folder, threads=threads).maxima,
        "sketch": _sketch(model, threads).product,
        "int4": _sketch(other, threads).product,
    }
    if not drop:
        session = open_session(head, threads=threads)
        kinds["full"] = lambda states: session.run(None, {"hidden_states": states[None]})
    files = [*_cold_files(folder), coarse / SKETCH_DATA_NAME]
    found: dict[str, dict[str, list[float]]] = {kind: {str(size): [] for size in SIZES} for kind in kinds}
    for repeat in range(_REPEATS):
        for size in SIZES:
            for kind, product in kinds.items():
                if drop:
                    drop_pages(files)
                start = time.perf_counter()
                product(hidden[:size])
                if repeat or drop:
                    found[kind][str(size)].append(1e3 * (time.perf_counter() - start))
    return found


def serve(folder: Path, threads: int) -> None:
    """Answer requests for greedy tokens until stdin ends."""
    model = _load(folder, threads)
    dropper = Dropper(_cold_files(folder))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        options = {name: request[name] for name in ("mode", "certify", "max_block") if name in request}
        options["temperature"] = 0.0
        first = _generate(model, dropper, request["prompt"], {**options, "max_new_tokens": 1})
        every = _generate(model, dropper, request["prompt"], {**options, "max_new_tokens": request["tokens"]})
        ids = every[1]
        print(json.dumps({"ms": every[0] - first[0], "tokens": len(ids), "ids": ids}), flush=True)


class Dropper:
    """Drops files before every check of this process, and counts the time of that.

    Outside of what `ExactChecker` measures: block sizes follow the checks' own times.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.seconds = 0.0
        check = ExactChecker.check

        def dropped_check(checker: ExactChecker, *given: Any) -> list[list[int]]:  # noqa: ANN401
            start = time.perf_counter()
            drop_pages(files)
            self.seconds += time.perf_counter() - start
            return check(checker, *given)

        setattr(ExactChecker, "check", dropped_check)  # noqa: B010 - a method to mypy


def _generate(
    model: Generator, dropper: Dropper, prompt: str, options: dict[str, Any]
) -> tuple[float, list[int]]:
    """Milliseconds less those of dropping, and the ids."""
    start, dropping = time.perf_counter(), dropper.seconds
    (result,) = model.generate(prompt, **options)
    return 1e3 * (time.perf_counter() - start - (dropper.seconds - dropping)), list(result.ids)


def _load(folder: Path, threads: int) -> Generator:
    model = load(folder, threads=threads)
    if not isinstance(model, Generator):
        raise TypeError(f"{folder} is no generator")
    return model


def _sketch(model: Generator, threads: int) -> Sketch:
    return Sketch(model.folder, model._cold, model._decoder.after_head, threads=threads)


def _cold_files(folder: Path) -> list[Path]:
    return [folder / COLD_NAME, folder / SKETCH_DATA_NAME]


def main() -> int:
    """Measure products and print them, or answer requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--products", type=Path, metavar="HEAD", help="graph of the full model's head")
    parser.add_argument("--coarse", type=Path, help="the folder with a sketch of 4 bits")
    parser.add_argument("--drop", action="store_true", help="measure products without cached pages")
    args = parser.parse_args()
    if args.products:
        found = products(args.folder, args.products, args.coarse, args.threads, drop=args.drop)
        print(json.dumps(found))
    else:
        serve(args.folder, args.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
