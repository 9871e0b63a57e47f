"""Serve a language model with the vocabulary rows a domain uses, and the full model's results.

Example:
    >>> import trimserve
    >>> profile = trimserve.profile(["tickets.txt"], "Qwen/Qwen3-0.6B")  # doctest: +SKIP
    >>> vocab = trimserve.select(profile, coverage=0.999)  # doctest: +SKIP
    >>> trimserve.export("Qwen/Qwen3-0.6B", vocab, "qwen3-tickets")  # doctest: +SKIP
    >>> model = trimserve.load("qwen3-tickets")  # doctest: +SKIP
    >>> print(*model.stream("Summarise: …", max_new_tokens=64), sep="")  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

from trimserve.arguments import AnyPath, checked
from trimserve.errors import (
    MismatchError,
    MissingExtraError,
    TrimserveError,
    UnknownIdError,
    UnsupportedModelError,
    UsageError,
    require,
)
from trimserve.faces import lazy_face
from trimserve.version import __version__

if TYPE_CHECKING:
    from trimserve.encoder.encoder import Encoder
    from trimserve.generation.generator import Generator
    from trimserve.generation.options import GenerationOptions
    from trimserve.generation.output import Generation
    from trimserve.loading import load
    from trimserve.profiles.difference import Difference, diff
    from trimserve.profiles.merging import merge
    from trimserve.profiles.profile import Profile
    from trimserve.profiles.profiling import profile
    from trimserve.selection.select_ids import select
    from trimserve.vocab.map import Reason, VocabMap
    from trimserve_export.inspection import Inspection
    from trimserve_export.pipeline import ExportResult
    from trimserve_export.verify import VerifyResult

__all__ = [
    "Difference",
    "Encoder",
    "Generation",
    "GenerationOptions",
    "Generator",
    "MismatchError",
    "MissingExtraError",
    "Profile",
    "Reason",
    "TrimserveError",
    "UnknownIdError",
    "UnsupportedModelError",
    "UsageError",
    "VocabMap",
    "__version__",
    "diff",
    "export",
    "inspect",
    "load",
    "merge",
    "profile",
    "select",
    "verify",
]

# `__all__` stays written out, for readers and for tools that do not run this module.
__getattr__, _listing, _ = lazy_face(
    __name__,
    {
        "Difference": "trimserve.profiles.difference",
        "Encoder": "trimserve.encoder.encoder",
        "Generation": "trimserve.generation.output",
        "GenerationOptions": "trimserve.generation.options",
        "Generator": "trimserve.generation.generator",
        "Profile": "trimserve.profiles.profiling",
        "Reason": "trimserve.vocab.map",
        "VocabMap": "trimserve.vocab.map",
        "diff": "trimserve.profiles.difference",
        "load": "trimserve.loading",
        "merge": "trimserve.profiles.merging",
        "profile": "trimserve.profiles.profiling",
        "select": "trimserve.selection.select_ids",
    },
)


def __dir__() -> list[str]:
    return sorted({*_listing(), *__all__})


@checked
def export(model: AnyPath, vocab: "VocabMap", output: AnyPath, **options: Any) -> "ExportResult":  # noqa: ANN401 - see pipeline.export
    """Make a trimmed folder; needs ``pip install 'trimserve[export]'``.

    Args:
        model: a folder or a hub id.
        vocab: the kept ids, from `select`.
        output: the folder to make.
        **options: those of `trimserve_export.pipeline.export`: task, dtype, cold, overwrite and others.

    Raises:
        MissingExtraError: the export extra is not installed.
        TrimserveError: see `trimserve_export.pipeline.export`.
    """
    pipeline = require("trimserve_export.pipeline", extra="export", purpose="trimserve.export")
    result: ExportResult = pipeline.export(model, vocab, output, **options)
    return result


@checked
def verify(folder: AnyPath, model: AnyPath | None = None, **options: Any) -> "VerifyResult":  # noqa: ANN401
    """Compare a trimmed folder with the full model; needs ``pip install 'trimserve[export]'``.

    Args:
        folder: the trimmed folder.
        model: the folder or hub id that it was made from.
        **options: those of `trimserve_export.verify.verify`, e.g. ``texts``.

    Raises:
        MissingExtraError: the export extra is not installed.
        TrimserveError: the folder or the model cannot be read; differing numbers are a result, not an error.
    """
    module = require("trimserve_export.verify", extra="export", purpose="trimserve.verify")
    result: VerifyResult = module.verify(folder, model, **options)
    return result


@checked
def inspect(path: AnyPath, **options: Any) -> "Inspection":  # noqa: ANN401
    """Tell what a model or folder is, its vocab tensors, and the most that trimming saves.

    Raises:
        MissingExtraError: the export extra is not installed.
        TrimserveError: the model cannot be read.
    """
    module = require("trimserve_export.inspection", extra="export", purpose="trimserve.inspect")
    result: Inspection = module.inspect(path, **options)
    return result
