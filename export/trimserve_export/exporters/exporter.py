"""Exporters: a checkpoint folder in, an ONNX graph out. One module an exporter.

None of them is imported here: each needs packages that another cannot share an environment with.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# In the order in which `auto` tries them.
EXPORTERS = ("genai", "transformers", "optimum")
DEVICES = ("cpu", "cuda", "webgpu")


@dataclass(frozen=True, slots=True)
class GraphJob:
    """What graph to make of a checkpoint.

    Attributes:
        task: one of `tasks.TASKS`.
        dtype: fp32, fp16 or bf16; the weights are converted to it.
        quantize: int4 or int8, for the exporters that quantise (`QUANTIZES`): graphs for other devices than
            the CPU, whose graphs `quantize.quantize_graph` quantises.
        device: one of `DEVICES`; only genai's graphs depend on it.
        trust_remote_code: allow code that the model folder brings.
    """

    task: str
    dtype: str = "fp32"
    quantize: str | None = None
    device: str = "cpu"
    trust_remote_code: bool = False


class Exporter(Protocol):
    """What each module of this package is.

    Attributes:
        QUANTIZES: it quantises the graph itself.
    """

    QUANTIZES: bool

    def check_model(self, config: "PretrainedConfig", task: str) -> None:
        """Refuse a model that this exporter has no export of.

        Raises:
            UnsupportedModelError: see above; the message names what it can do.
        """

    def check_job(self, job: GraphJob) -> None:
        """Refuse a device, dtype or quantisation that this exporter makes no graphs with.

        Raises:
            UsageError: see above; the message names what it makes.
        """

    def export_checkpoint(self, folder: Path, output: Path, job: GraphJob) -> Path:
        """Export a checkpoint folder to ONNX.

        Args:
            folder: config.json and safetensors weights.
            output: the folder to write into.
            job: what to make.

        Returns:
            The path of the graph; its weights may lie beside it in external data. For an encoder-decoder
            the folder of its graphs.

        Raises:
            MissingExtraError: a package that the exporter needs is not installed.
            UnsupportedModelError: the model cannot be loaded for the task, or the exporter fails.
        """

    def versions(self) -> dict[str, str]:
        """Its name (key ``name``) and the versions of what it used, for the manifest."""


def load_exporter(name: str) -> Exporter:
    """Import an exporter's module.

    Args:
        name: one of `EXPORTERS`.
    """
    return cast(Exporter, importlib.import_module(f"trimserve_export.exporters.{name}"))
