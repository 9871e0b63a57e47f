"""What exporters share: silence, one sentence for whatever tracing a model can raise, and writing a graph."""

import contextlib
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from trimserve.errors import UnsupportedModelError
from trimserve.foreign import foreign
from trimserve_export.checkpoint.library import quiet as quiet


def failures_named(exporter: str, model_type: str, task: str) -> contextlib.AbstractContextManager[None]:
    """Turn whatever an exporter can raise into one sentence; want of disk or memory says so.

    Raises:
        UnsupportedModelError: in place of the exporter's error.
    """
    return foreign(
        f"{exporter} cannot export this {model_type!r} model for {task}",
        advice="choose another --exporter or --task, or fetch the model again if it is damaged.",
        error=UnsupportedModelError,
    )


def write_graph(program: ir.Model, path: Path) -> Path:
    """Write a traced graph, without what no output needs, and its weights beside it.

    Returns:
        The graph's path.
    """
    RemoveUnusedNodesPass()(program)
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(program, path, external_data=f"{path.name}_data")
    return path
