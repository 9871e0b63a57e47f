"""What transformers' exporter made of a checkpoint, once for all tests and workers.

Tracing the tiniest model takes it seconds, and the tests export the same few models again and again. The
first to ask has the checkpoint traced; who asks with the same bytes and the same job gets a copy.
"""

import functools
import hashlib
import os
import shutil
import tempfile
from dataclasses import astuple
from pathlib import Path

VARIABLE = "TRIMSERVE_TEST_TRACES"
_READ = ("*.json", "*.safetensors", "*.py")
_PLACE = ".place"


def make_store() -> Path:
    """A folder for traces, which processes that are started later know, too."""
    folder = Path(tempfile.mkdtemp(prefix="trimserve-traces-"))
    os.environ[VARIABLE] = str(folder)
    return folder


def remember_traces() -> None:
    """Have the exporter of this process look into the store first; does nothing where there is neither."""
    from trimserve_export.exporters.choice import is_installed

    if VARIABLE in os.environ and is_installed("transformers"):
        _patch(Path(os.environ[VARIABLE]))


@functools.cache
def _patch(store: Path) -> None:
    from trimserve_export.exporters import transformers as exporter

    trace = exporter.export_checkpoint

    @functools.wraps(trace)
    def export_checkpoint(folder: Path, output: Path, job) -> Path:
        if forgetful:
            return trace(folder, output, job)
        known = store / _key(folder, job)
        if not known.exists():
            with tempfile.TemporaryDirectory(dir=store) as scratch:
                made = trace(folder, Path(scratch) / "made", job)
                (Path(scratch) / "made" / _PLACE).write_text(str(made.relative_to(Path(scratch) / "made")))
                try:
                    (Path(scratch) / "made").rename(known)
                except OSError:  # another worker was faster
                    assert known.exists()
        shutil.copytree(known, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_PLACE))
        return output / (known / _PLACE).read_text()

    exporter.export_checkpoint = export_checkpoint


# Not empty while a test changes how models are traced.
forgetful: list[str] = []


def _key(folder: Path, job) -> str:
    digest = hashlib.sha256(repr(astuple(job)).encode())
    for path in sorted(path for pattern in _READ for path in folder.glob(pattern)):
        if not path.name.startswith(("tokenizer", "special_tokens")):
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
