"""Which exporter makes a model's graph: what was asked for, what is installed, and what the model needs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import transformers

from trimserve.errors import MissingExtraError, UnsupportedModelError, UsageError
from trimserve_export.exporters.exporter import EXPORTERS, Exporter, GraphJob, load_exporter

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class Choice:
    """An exporter and why it is the one.

    Attributes:
        name: one of `EXPORTERS`.
        reason: a clause for the user.
        exporter: its module.
        rival: what is taken where this one's graph does not give the model's numbers; None where it is taken
            as it is.
    """

    name: str
    reason: str
    exporter: Exporter
    rival: "Choice | None" = None

    def because(self, reason: str) -> "Choice":
        """The same exporter, taken for good."""
        return replace(self, reason=reason, rival=None)


def choose_exporter(asked: str, config: "PretrainedConfig", job: GraphJob) -> Choice:
    """Choose the exporter of a model.

    Args:
        asked: ``"auto"`` or one of `EXPORTERS`.
        config: the model's config.
        job: what graph is to be made.

    Raises:
        MissingExtraError: the exporter asked for, or every one, is not installed.
        UnsupportedModelError: none that is installed exports this model; the message says what each lacks.
    """
    if asked != "auto":
        _require(asked)
        exporter = load_exporter(asked)
        exporter.check_model(config, job.task)
        exporter.check_job(job)
        return Choice(asked, "asked for", exporter)
    installed = [name for name in EXPORTERS if is_installed(name)]
    if not installed:
        _require("transformers")
    # Graphs for one device, which the builder alone makes.
    candidates = [name for name in installed if job.device == "cpu" or name == "genai"]
    refusals: list[str] = []
    able: list[Choice] = []
    for name in candidates:
        exporter = load_exporter(name)
        try:
            exporter.check_model(config, job.task)
            exporter.check_job(job)
        except (UnsupportedModelError, UsageError) as error:
            refusals.append(str(error))
        else:
            able.append(Choice(name, _reason(name, refusals), exporter))
    if able:
        # The builder writes architectures anew; its graphs for other devices cannot be run here.
        is_compared = able[0].name == "genai" and job.device == "cpu" and len(able) > 1
        return replace(able[0], rival=able[1]) if is_compared else able[0]
    missing = f"no installed exporter makes graphs for {job.device}: install trimserve[export]."
    raise UnsupportedModelError(" ".join(refusals) or missing)


def is_installed(name: str) -> bool:
    """Whether the packages of an exporter are in this environment."""
    return _INSTALLED[name]()


def _reason(name: str, refusals: list[str]) -> str:
    reason = _REASONS[name]
    return f"{reason} ({' '.join(refusals)})" if refusals else reason


_REASONS = {
    "optimum": "the one that is installed",
    "genai": "fused operators, and loads in onnxruntime-genai, too",
    "transformers": "the model's own code, traced",
}


def _has_optimum() -> bool:
    return find_spec("optimum") is not None and find_spec("optimum.exporters.onnx") is not None


def _has_transformers_5() -> bool:
    return int(transformers.__version__.partition(".")[0]) >= 5


def _has_exporter_of_transformers() -> bool:
    return _has_transformers_5() and find_spec("onnxscript") is not None


def _has_builder() -> bool:
    return _has_transformers_5() and find_spec("onnxruntime_genai") is not None


_INSTALLED: dict[str, Callable[[], bool]] = {
    "optimum": _has_optimum,
    "genai": _has_builder,
    "transformers": _has_exporter_of_transformers,
}
_NEEDS = {
    "optimum": ("optimum-onnx and transformers 4.57", "export-optimum"),
    "genai": ("transformers 5 and onnxruntime-genai", "export"),
    "transformers": ("transformers 5 and onnxscript", "export"),
}


def _require(name: str) -> None:
    if not is_installed(name):
        packages, extra = _NEEDS[name]
        raise MissingExtraError(
            f"--exporter {name} needs {packages}, which this environment has not. Install it in one of its "
            f"own with: pip install 'trimserve[{extra}]'"
        )
