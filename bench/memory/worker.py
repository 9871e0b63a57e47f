"""One process of the memory benchmark: load a generator's folder, and tell the memory after each part.

Nothing is imported before it is counted. The last line of stdout is JSON: stage -> bytes.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PROMPT = "How many apples are left if 3 of 12 are eaten?"
_TOKENS = 32


def main(folder: Path, threads: int) -> dict[str, dict[str, int]]:
    """The stages, in order; each adds to the one before."""
    stages = {"interpreter": memory()}

    import numpy  # noqa: F401

    stages["numpy"] = memory()

    import onnxruntime  # noqa: F401

    stages["onnxruntime"] = memory()

    import tokenizers  # noqa: F401

    import trimserve.generation.generator
    import trimserve.loading

    stages["trimserve"] = memory()

    def counted(stage: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: object, **options: object) -> object:
            result = step(*args, **options)
            stages[stage] = memory()
            return result

        return run

    # What `load` calls after the tokenizer and for the graph.
    loading: Any = trimserve.loading
    for stage, name in (("tokenizer", "release_free_memory"), ("graph", "open_session")):
        setattr(loading, name, counted(stage, getattr(loading, name)))
    model = loading.load(folder, threads=threads)
    for mode in ("compact", "exact"):
        model.generate(_PROMPT, max_new_tokens=_TOKENS, mode=mode, temperature=0.0)
        stages[f"{mode} answer"] = memory()
    return stages


def memory() -> dict[str, int]:
    """RssAnon, RssFile and VmHWM of this process in bytes."""
    status = Path("/proc/self/status").read_text("utf-8")
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    names = {"anonymous": "RssAnon", "file": "RssFile", "peak": "VmHWM"}
    return {key: 1024 * int(fields[name].split()[0]) for key, name in names.items()}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
