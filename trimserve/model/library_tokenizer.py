"""Load a tokenizer with transformers and say, in JSON values, what texts are tokenized with.

The one place of the light package that imports transformers: in the caller's process where transformers is
loaded already, else in a process of its own, which keeps out what takes most of its memory.
"""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trimserve.files.model_json import MOST_ROWS
from trimserve.files.scratch import scratch_folder
from trimserve.folder.names import TOKENIZER_NAME
from trimserve.folder.tokenizer_settings import NO_LIMIT, ROLES
from trimserve.foreign import is_panic, reason
from trimserve.text.same_tokenizer import same_tokenizer
from trimserve.text.tokenizer import end_of_ids, load_tokenizer

Json = dict[str, Any]


def ask_transformers(folder: Path, *, trust_remote_code: bool) -> Json:
    """`read_with_transformers`, here or in a process that gives its memory back when it ends."""
    if "transformers" in sys.modules:
        return read_with_transformers(folder, trust_remote_code=trust_remote_code)
    with scratch_folder("tokenizer") as scratch:
        answer = scratch / "answer.json"
        command = [sys.executable, "-m", __name__, str(folder), str(answer), str(int(trust_remote_code))]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if not answer.is_file():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return {"error": last, "version": importlib.metadata.version("transformers")}
        found: Json = json.loads(answer.read_text("utf-8"))
        return found


def read_with_transformers(folder: Path, *, trust_remote_code: bool = False) -> Json:
    """Load a tokenizer with transformers and say what it is, in JSON values.

    Returns:
        version, and one of: error (a phrase); python (a class that has no tokenizer.json); or class, settings
        and content: a tokenizer.json, None where the folder's own gives the same ids, offsets and text.
    """
    transformers = importlib.import_module("transformers")
    version, level = str(transformers.__version__), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # advice about its own arguments
    path = folder / TOKENIZER_NAME
    try:
        own = load_tokenizer(path) if path.is_file() else None  # refuses what would take all memory below
        loaded = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        backend = getattr(loaded, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            return {"version": version, "python": type(loaded).__name__}
        split = bool(backend.encode_special_tokens)
        backend.no_padding()
        backend.no_truncation()
        # It is written id by id up to the largest, which any of the tokenizer's files may name.
        if (end := end_of_ids(backend)) > MOST_ROWS:
            return {"version": version, "error": f"its largest id, {end - 1:,}, is above {MOST_ROWS - 1:,}"}
        content: str | None = backend.to_str()
        settings = _settings(loaded, backend) | {"split_special_tokens": split}
    except BaseException as error:  # of any class: the folder may bring its own
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        return {"version": version, "error": reason(error)}
    finally:
        transformers.logging.set_verbosity(level)
    if own is not None and same_tokenizer(own.to_str(), str(content)):
        content = None
    return {
        "version": version,
        "class": type(loaded).__name__,
        "content": content,
        "settings": settings,
    }


def _settings(loaded: Any, backend: Tokenizer) -> Json:  # noqa: ANN401 - a tokenizer of transformers
    limit = loaded.model_max_length
    if not isinstance(limit, int | float):
        raise TypeError(f"model_max_length is {limit!r}, which is no number")
    clean = bool(loaded.clean_up_tokenization_spaces)
    # transformers 5 leaves the text of BPE alone unless it is told twice.
    forced = getattr(loaded, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", None)
    if forced is not None and type(backend.model).__name__ == "BPE":
        clean = clean and bool(forced)
    named = {role: getattr(loaded, role, None) for role in ROLES}
    return {
        "truncation_side": loaded.truncation_side,
        "model_max_length": int(limit) if limit < NO_LIMIT else None,
        "clean_up": clean,
        "special_tokens": {role: str(token) for role, token in named.items() if token is not None},
    }


def _main(folder: str, answer: str, trust: str) -> None:
    """A process of its own: what takes half of transformers' memory and import time is kept out."""
    kept_out: Any = dict.fromkeys(("torch", "tensorflow", "jax", "flax"))  # None: not importable
    sys.modules.update(kept_out)
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the folder
    found = read_with_transformers(Path(folder), trust_remote_code=trust == "1")
    Path(answer).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:4])
