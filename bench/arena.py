"""What ONNX Runtime's arenas hold: its profile notes that after every operator, for the operator's provider.

An arena is what a session takes from the system for packed weights, activations and, on a GPU, weights: on a
CPU a part of anonymous memory, on a GPU of what NVML counts. Profiling costs time, so it has a process of its
own: ``python -m bench.arena FOLDER --request JSON``.
"""

import argparse
import gc
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bench import harness
from trimserve.loading import load
from trimserve.runtime import session

if TYPE_CHECKING:
    import onnxruntime as ort


def arena_bytes(folder: Path, request: dict[str, Any], *, device: str, threads: int) -> dict[str, int]:
    """Measure in a fresh process.

    Args:
        folder: a generator's.
        request: {"prompts", "tokens", "mode"}.
        device: where it runs.
        threads: of one operator.

    Returns:
        Provider -> the most bytes that its arenas held, over all sessions.
    """
    words = ["-m", "bench.arena", str(folder), "--request", json.dumps(request)]
    return harness.fresh_process([*words, "--device", device, "--threads", str(threads)])


def held(profiles: Iterable[Path]) -> dict[str, int]:
    """Sum what `InferenceSession` profiles say of the arenas, by provider.

    Each session has its own arena for a provider. Nothing is found where onnxruntime does not note it.
    """
    found: Counter[str] = Counter()
    for profile in profiles:
        most: dict[str, int] = {}
        for event in json.loads(profile.read_text("utf-8")):
            notes = event.get("args", {})
            if "mem_arena_held" in notes:
                provider = notes["provider"]
                most[provider] = max(most.get(provider, 0), int(notes["mem_arena_held"]))
        found.update(most)
    return dict(found)


@contextmanager
def profiled_sessions(folder: Path) -> Iterator[None]:
    """Let every session that the runtime opens inside write its profile into a folder when it is closed."""
    make: Callable[..., ort.SessionOptions] = session._options

    def profiled(runtime: ModuleType, threads: int, plan: session.MemoryPlan) -> "ort.SessionOptions":
        options = make(runtime, threads, plan)
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        return options

    session._options = profiled
    try:
        yield
    finally:
        session._options = make


def main() -> int:
    """Answer the request with profiled sessions; print {provider: bytes}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--request", type=json.loads, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        with profiled_sessions(Path(scratch)):
            model: Any = load(args.folder, device=args.device, threads=args.threads)
            request = args.request
            model.generate(
                request["prompts"], max_new_tokens=request["tokens"], mode=request["mode"], temperature=0.0
            )
            del model
            gc.collect()  # closes the sessions
        print(json.dumps(held(Path(scratch).iterdir())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
