"""Export a checkpoint folder with optimum-onnx (TorchScript exporter, opset 18)."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from optimum.exporters.onnx import OnnxConfig, onnx_export_from_model
from optimum.exporters.tasks import TasksManager
from optimum.utils import logging as optimum_logging
from transformers import PretrainedConfig, PreTrainedModel

from trimserve.errors import UnsupportedModelError, require
from trimserve.folder import TEXT2TEXT_TASK
from trimserve_export.vocab_axes import ModelClass

logger = logging.getLogger(__name__)

TASKS = (
    "feature-extraction",
    "fill-mask",
    "text-classification",
    "token-classification",
    "text-generation-with-past",
    TEXT2TEXT_TASK,
)
_TASK_OF_HEAD = {
    "ForCausalLM": "text-generation-with-past",
    "LMHeadModel": "text-generation-with-past",
    "ForMaskedLM": "fill-mask",
    "ForPreTraining": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "Model": "feature-extraction",
}
_TEXT2TEXT_HEADS = ("ForConditionalGeneration", "MTModel")
# optimum-onnx measures a graph as one protobuf message, with its weights, to tie them: an error above 2 GiB.
_MAX_POST_PROCESSED_BYTES = 2**31 - (64 << 20)
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def infer_task(config: PretrainedConfig, *, sentence_transformers: bool) -> str:
    """Tell the task of a checkpoint by its architecture.

    Args:
        config: the model's config.
        sentence_transformers: the folder has a modules.json, so its model makes hidden states for pooling
            whatever class it was trained in.

    Raises:
        UnsupportedModelError: no architecture, or one whose task is not known or not built yet.
    """
    if sentence_transformers:
        return "feature-extraction"
    name = (config.architectures or [""])[0]
    if config.is_encoder_decoder and name.endswith(_TEXT2TEXT_HEADS):
        return TEXT2TEXT_TASK
    if config.is_encoder_decoder or name.endswith("ForConditionalGeneration"):
        raise UnsupportedModelError(
            f"{name} is a part of an encoder-decoder, or a multimodal model, which cannot be trimmed yet."
        )
    for ending, task in _TASK_OF_HEAD.items():
        if name.endswith(ending):
            return task
    raise UnsupportedModelError(
        f"the task cannot be told from architectures = {config.architectures}: pass --task, one of "
        f"{', '.join(TASKS)}."
    )


def task_class(task: str, config: PretrainedConfig) -> ModelClass:
    """Return the class that loads a checkpoint for a task.

    Raises:
        UnsupportedModelError: a task that this exporter has not, or not for this model type.
    """
    if task not in TASKS:
        raise UnsupportedModelError(f"task {task!r} is not known: expected one of {', '.join(TASKS)}.")
    try:
        supported = TasksManager.get_supported_tasks_for_model_type(
            config.model_type, "onnx", library_name="transformers"
        )
    except KeyError:
        supported = {}
    if task not in supported:
        exporter, names = (
            f"optimum-onnx {version('optimum-onnx')}",
            [name for name in TASKS if name in supported],
        )
        if not names:
            raise UnsupportedModelError(f"{exporter} has no export of {config.model_type!r} models.")
        raise UnsupportedModelError(
            f"{exporter} exports {', '.join(names)} of a {config.model_type!r} model, not {task}: "
            "choose another task."
        )
    if getattr(config, "attention_type", None) == "block_sparse":  # BigBird, BigBirdPegasus
        raise UnsupportedModelError(
            f"a {config.model_type!r} model reads long texts with block-sparse attention, which "
            'optimum-onnx replaces by full attention: set "attention_type" to "original_full" in its '
            "config.json if that is the model you want."
        )
    return TasksManager.get_model_class_for_task(task, model_type=config.model_type)


def export_checkpoint(
    folder: Path, output: Path, task: str, dtype: str, *, trust_remote_code: bool = False
) -> Path:
    """Export a checkpoint folder to ONNX.

    Args:
        folder: config.json and safetensors weights.
        output: the folder to write into.
        task: one of `TASKS`.
        dtype: fp32, fp16 or bf16; the weights are converted to it.
        trust_remote_code: allow code that the model folder brings.

    Returns:
        The path of the graph; its weights may lie beside it in external data. For an encoder-decoder the
        folder of its three graphs.

    Raises:
        MissingExtraError: accelerate is not installed; without it tied weights would double, silently.
        UnsupportedModelError: the model cannot be loaded for the task, or the exporter fails.
    """
    require("accelerate", extra="export", purpose="exporting tied weights once")
    seq2seq = task == TEXT2TEXT_TASK
    with quiet():
        model = load_model(folder, task, dtype, trust_remote_code=trust_remote_code)
        with _failures_named(model.config.model_type, task), _no_cpu_session(dtype):
            # Merging an encoder-decoder's two decoders would write them once more: the serving passes take
            # one of them. They also tie weights themselves.
            skip = seq2seq or _parameter_bytes(model) > _MAX_POST_PROCESSED_BYTES
            onnx_export_from_model(model, output, task=task, do_validation=False, no_post_process=skip)
    return output if seq2seq else output / "model.onnx"


def _parameter_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model's weights as a graph stores them at first: a tied one in each of its places."""
    parameters = (parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


@contextlib.contextmanager
def _failures_named(model_type: str, task: str) -> Iterator[None]:
    """Turn whatever tracing a model can raise into one sentence; want of disk or memory passes."""
    try:
        yield
    except (OSError, MemoryError, UnsupportedModelError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UnsupportedModelError(
            f"optimum-onnx {version('optimum-onnx')} cannot export this {model_type!r} model for {task}: "
            f"{reason}"
        ) from error


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


def load_model(folder: Path, task: str, dtype: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a checkpoint in the class of a task, for inference on the CPU.

    Raises:
        UnsupportedModelError: weights that the task needs are not in the checkpoint.
    """
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model, report = task_class(task, config).from_pretrained(
        folder,
        config=config,
        torch_dtype=TORCH_DTYPES[dtype],
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    # Encoders saved with a head have no pooler; no task here reads it.
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise UnsupportedModelError(
            f"the checkpoint has no {missing[0]}, which {task} needs ({len(missing)} tensors missing): "
            "choose the task it was trained for."
        )
    model.config.use_cache = task.endswith("-with-past")
    return model.eval()  # type: ignore[no-any-return]


def versions() -> dict[str, str]:
    """Name of this exporter and the versions of what it used, for the manifest."""
    names = ("optimum-onnx", "transformers", "torch", "onnx", "onnx-ir")
    return {"name": "optimum"} | {name: version(name) for name in names}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send the exporter's prints and warnings to logging (level debug): none of it concerns the user."""
    text = io.StringIO()
    levels = optimum_logging.get_verbosity(), transformers.logging.get_verbosity()
    optimum_logging.set_verbosity_error()
    transformers.logging.set_verbosity(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(text),
            contextlib.redirect_stderr(text),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        optimum_logging.set_verbosity(levels[0])
        transformers.logging.set_verbosity(levels[1])
        for line in text.getvalue().splitlines():
            logger.debug("%s", line)
