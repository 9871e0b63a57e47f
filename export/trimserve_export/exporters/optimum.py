"""Export a checkpoint folder with optimum-onnx (TorchScript exporter, opset 18)."""

import contextlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from optimum.exporters.onnx import OnnxConfig, onnx_export_from_model
from optimum.exporters.onnx.model_configs import T5EncoderOnnxConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils import logging as optimum_logging
from transformers import PretrainedConfig, PreTrainedModel

from trimserve.errors import UnsupportedModelError, require
from trimserve.folder.tasks import TEXT2TEXT_TASK
from trimserve_export.checkpoint.tasks import TASKS, check_task, load_model
from trimserve_export.exporters import tracing
from trimserve_export.exporters.exporter import GraphJob
from trimserve_export.exporters.rope import rope_by_length

QUANTIZES = False
# optimum-onnx measures a graph as one protobuf message, with its weights, to tie them: an error above 2 GiB.
_MAX_POST_PROCESSED_BYTES = 2**31 - (64 << 20)


def check_model(config: PretrainedConfig, task: str) -> None:
    """Refuse a model or a task that optimum-onnx has no export of.

    Raises:
        UnsupportedModelError: see above.
    """
    check_task(task)
    try:
        supported = TasksManager.get_supported_tasks_for_model_type(
            config.model_type, "onnx", library_name="transformers"
        )
    except KeyError:
        supported = {}
    if task not in supported:
        names = [name for name in TASKS if name in supported]
        if not names:
            raise UnsupportedModelError(f"{_name()} has no export of {config.model_type!r} models.")
        raise UnsupportedModelError(
            f"{_name()} exports {', '.join(names)} of a {config.model_type!r} model, not {task}: "
            "choose another task."
        )
    if getattr(config, "attention_type", None) == "block_sparse":  # BigBird, BigBirdPegasus
        raise UnsupportedModelError(
            f"a {config.model_type!r} model reads long texts with block-sparse attention, which "
            'optimum-onnx replaces by full attention: set "attention_type" to "original_full" in its '
            "config.json if that is the model you want."
        )


def check_job(job: GraphJob) -> None:
    """Graphs for the CPU can have any dtype here; see `Exporter`."""


def export_checkpoint(folder: Path, output: Path, job: GraphJob) -> Path:
    """Export a checkpoint folder to ONNX; see `Exporter`."""
    require("accelerate", extra="export-optimum", purpose="exporting tied weights once")
    seq2seq = job.task == TEXT2TEXT_TASK
    with quiet():
        model = load_model(folder, job.task, job.dtype, trust_remote_code=job.trust_remote_code)
        with (
            tracing.failures_named(_name(), model.config.model_type, job.task),
            _no_cpu_session(job.dtype),
            rope_by_length(model),
        ):
            # Merging an encoder-decoder's two decoders would write them once more: the serving passes take
            # one of them. They also tie weights themselves.
            skip = seq2seq or _parameter_bytes(model) > _MAX_POST_PROCESSED_BYTES
            onnx_export_from_model(
                model,
                output,
                task=job.task,
                do_validation=False,
                no_post_process=skip,
                custom_onnx_configs=_own_configs(model, job.task),
            )
    return output if seq2seq else output / "model.onnx"


class _EncoderOfPair(T5EncoderOnnxConfig):  # type: ignore[misc]
    """The encoder of an encoder-decoder by itself; optimum's own has no mask."""

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Names and axes."""
        axes = {0: "batch_size", 1: "sequence_length"}
        return {"input_ids": axes, "attention_mask": axes}


def _own_configs(model: PreTrainedModel, task: str) -> dict[str, OnnxConfig] | None:
    """What optimum-onnx is to export where it would take the decoder as well."""
    alone = task == "feature-extraction" and type(model).__name__.endswith("EncoderModel")
    if not alone or not hasattr(model.config, "decoder_start_token_id"):
        return None
    return {"model": _EncoderOfPair(model.config, task=task)}


def _name() -> str:
    return f"optimum-onnx {version('optimum-onnx')}"


def _parameter_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model's weights as a graph stores them at first: a tied one in each of its places."""
    parameters = (parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


@contextlib.contextmanager
def _no_cpu_session(dtype: str) -> Iterator[None]:
    """Keep optimum-onnx from opening a bf16 graph, which ONNX Runtime's CPU kernels cannot run.

    It does so after each export, only to turn symbolic output dimensions that are constant into numbers.
    """
    original = OnnxConfig.fix_dynamic_axes
    if dtype == "bf16":
        OnnxConfig.fix_dynamic_axes = lambda *_args, **_options: None
    try:
        yield
    finally:
        OnnxConfig.fix_dynamic_axes = original


def versions() -> dict[str, str]:
    """Name of this exporter and the versions of what it used, for the manifest."""
    names = ("optimum-onnx", "transformers", "torch", "onnx", "onnx-ir")
    return {"name": "optimum"} | {name: version(name) for name in names}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """See `tracing.quiet`; optimum has a verbosity of its own."""
    level = optimum_logging.get_verbosity()
    optimum_logging.set_verbosity_error()
    try:
        with tracing.quiet():
            yield
    finally:
        optimum_logging.set_verbosity(level)
