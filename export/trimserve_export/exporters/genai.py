"""Export a decoder's checkpoint folder with onnxruntime-genai's model builder.

Its graphs have ONNX Runtime's fused operators (GroupQueryAttention over a shared cache), made for one
device, and the builder quantises them itself.
"""

import contextlib
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PretrainedConfig

from trimserve.errors import UnsupportedModelError, UsageError, require
from trimserve.files.scratch import scratch_folder
from trimserve.folder.tasks import GENERATION_TASK
from trimserve_export.checkpoint.axes import build_on_meta, load_config
from trimserve_export.checkpoint.tasks import TASK_CLASSES, check_task
from trimserve_export.exporters import tracing
from trimserve_export.exporters.exporter import GraphJob
from trimserve_export.exporters.genai_mends import check_positions, mend, plain_rope

# The builder quantises, so nobody else has to.
QUANTIZES = True
# Text decoders among the architectures that the builder names in its create_model, without OLMo, whose
# normalisation it takes for another one.
ARCHITECTURES = frozenset(
    f"{name}ForCausalLM"
    for name in (
        *("Ernie4_5", "Gemma", "Gemma2", "Gemma3", "GptOss", "Granite", "GraniteMoeHybrid", "HunYuanDenseV1"),
        *(
            "Lfm2",
            "Lfm2Moe",
            "Llama",
            "Mistral",
            "Nemotron",
            "Phi",
            "Phi3",
            "PhiMoE",
            "Qwen2",
            "Qwen3",
        ),
        "SmolLM3",
    )
)
# GroupQueryAttention takes no other head sizes.
_HEAD_SIZES = 16
# (device, quantisation) -> dtypes of activations that the builder makes graphs of.
_DTYPES: dict[tuple[str, str | None], tuple[str, ...]] = {
    ("cpu", None): ("fp32",),
    ("cpu", "int4"): ("fp32",),
    ("cpu", "int8"): ("fp32",),
    ("cuda", None): ("fp32", "fp16", "bf16"),
    ("cuda", "int4"): ("fp16", "bf16"),
    ("cuda", "int8"): ("fp16",),
    ("webgpu", None): ("fp16", "fp32"),
    ("webgpu", "int4"): ("fp16", "fp32"),
    ("webgpu", "int8"): ("fp16", "fp32"),
}
_PURPOSE = "export --exporter genai"


def check_model(config: PretrainedConfig, task: str) -> None:
    """Refuse a model or a task that the builder does not know.

    Raises:
        UnsupportedModelError: see above.
    """
    check_task(task)
    if task != GENERATION_TASK:
        raise UnsupportedModelError(f"{_name()} builds {GENERATION_TASK} alone: use another exporter.")
    architecture = (config.architectures or ["a model without a class"])[0]
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(f"{_name()} does not build {architecture}: use another exporter.")
    if (size := _head_size(config.get_text_config())) % _HEAD_SIZES:
        raise UnsupportedModelError(
            f"{_name()} builds attention over heads of a multiple of {_HEAD_SIZES} numbers, and this model's "
            f"have {size}: use another exporter."
        )
    check_positions(_name(), config)


def check_job(job: GraphJob) -> None:
    """Refuse what the builder makes no graphs with; see `Exporter`.

    Raises:
        UsageError: see above.
    """
    _settings(job)


def _head_size(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def export_checkpoint(folder: Path, output: Path, job: GraphJob) -> Path:
    """Export a checkpoint folder to ONNX; see `Exporter`.

    A genai_config.json lies beside the graph.
    """
    precision, options = _settings(job)
    builder = _builder()
    config = load_config(folder, trust_remote_code=job.trust_remote_code)
    _check_widths(config)
    with (
        scratch_folder("genai") as scratch,
        tracing.quiet(),
        _quantizer_silenced(),
        tracing.failures_named(_name(), config.model_type, job.task),
    ):
        source = _with_stub_tokenizer(folder, scratch / "model")
        where = (str(source), str(output), precision, job.device, str(scratch / "cache"))
        prepared = builder.parse_extra_options(
            "", *where, [f"{key}={value}" for key, value in options.items()]
        )
        _flatten_rope(prepared["hf_details"]["hf_config"])
        plain_rope(prepared["hf_details"]["hf_config"])
        builder.create_model("", *where, **prepared)
    path = output / "model.onnx"
    model = ir.load(path)
    mend(model, config, _name())
    _name_cache_width(model.graph, config.get_text_config())
    ir.save(model, path)
    return path


def _settings(job: GraphJob) -> tuple[str, dict[str, str]]:
    """The builder's precision and options.

    Raises:
        UsageError: the builder makes no such graph.
    """
    possible = _DTYPES[job.device, job.quantize]
    if job.dtype not in possible:
        what = f"{job.quantize or 'unquantised'} graphs for {job.device}"
        raise UsageError(f"{_name()} makes {what} with --dtype {' or '.join(possible)}, not {job.dtype}.")
    # A cache of the last positions alone has a size that runtimes other than onnxruntime-genai do not know.
    options = {"hf_remote": str(job.trust_remote_code).lower(), "windowed_kv_cache": "false"}
    if (job.device, job.dtype) == ("webgpu", "fp32"):
        options["use_webgpu_fp32"] = "true"
    if job.quantize and job.dtype == "bf16":
        options["use_cuda_bf16"] = "true"
    return job.quantize or job.dtype, options


def _builder() -> Any:  # noqa: ANN401 - onnxruntime-genai has no types
    """Import the builder.

    Raises:
        MissingExtraError: it, or transformers 5, is not installed.
    """
    require("onnxruntime_genai", extra="export", purpose=_PURPOSE)
    with _quantizer_silenced():
        try:
            return require("onnxruntime_genai.models.builder", extra="export", purpose=_PURPOSE)
        except ImportError as error:
            raise UnsupportedModelError(
                f"{_name()} needs transformers 5, found {version('transformers')}: use an environment with "
                "trimserve[export]."
            ) from error


@contextlib.contextmanager
def _quantizer_silenced() -> Iterator[None]:
    """Keep ONNX Runtime's quantiser from setting up logging for the whole process, and from using it."""
    root, quantizer = (
        logging.getLogger(),
        logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer"),
    )
    silent = logging.NullHandler()  # logging.basicConfig does nothing to a root that has a handler
    root.addHandler(silent)
    level = quantizer.level
    quantizer.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        quantizer.setLevel(level)
        root.removeHandler(silent)


def _check_widths(config: PretrainedConfig) -> None:
    """Refuse a model whose head the builder would mistake.

    It takes every Linear with as many outputs as there are vocab rows for the head, and every table with as
    many rows for the embedding, silently.
    """
    rows = config.get_text_config().vocab_size
    model = build_on_meta(config, TASK_CLASSES[GENERATION_TASK])
    known = (model.get_output_embeddings(), model.get_input_embeddings())  # type: ignore[no-untyped-call]
    for name, module in model.named_modules():
        width = _width(module)
        if width == rows and not any(module is part for part in known):
            raise UnsupportedModelError(
                f"{name} has {rows:,} rows like the vocab, and {_name()} would take it for the head: select "
                "128 ids more (trimserve select avoids such sizes), or use another exporter."
            )


def _width(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.num_embeddings if isinstance(module, nn.Embedding) else None


def _with_stub_tokenizer(folder: Path, target: Path) -> Path:
    """A folder with links to a checkpoint's files and a tokenizer of one token.

    The builder wants a tokenizer, and reads ids of special tokens from it that are not compact: without any,
    the configs' ids stand.
    """
    target.mkdir()
    for path in folder.iterdir():
        if path.is_file() and (
            path.suffix in (".safetensors", ".py") or "config" in path.name or "index" in path.name
        ):
            (target / path.name).symlink_to(path.resolve())
    (target / "tokenizer_config.json").unlink(missing_ok=True)
    (target / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', "utf-8")
    Tokenizer(WordLevel({"?": 0}, unk_token="?")).save(str(target / "tokenizer.json"))
    return target


def _flatten_rope(config: PretrainedConfig) -> None:
    """Give the builder Gemma 3's rope parameters as transformers 4 had them.

    transformers 5 keeps a set of them for each type of layer, which the builder's reader does not expect.

    Raises:
        UnsupportedModelError: a set with a scale: the builder would apply it to all layers.
    """
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or not {"full_attention", "sliding_attention"} <= rope.keys():
        return
    types = {parameters.get("rope_type", "default") for parameters in rope.values()}
    if types != {"default"}:
        raise UnsupportedModelError(
            f"{_name()} would scale the positions of all layers of this {config.model_type!r} model, which "
            "scales those of some: use --exporter transformers."
        )
    config.rope_theta = rope["full_attention"]["rope_theta"]
    config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
    config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_theta}


def _name_cache_width(graph: ir.Graph, config: PretrainedConfig) -> None:
    """Write the size of a head where the builder wrote a symbol: runtimes allocate the cache by it."""
    width = _head_size(config)
    for value in (*graph.inputs, *graph.outputs):
        if str(value.name).startswith(("past_key_values.", "present.")) and value.shape is not None:
            value.shape = ir.Shape([*list(value.shape)[:-1], width])


def _name() -> str:
    return f"onnxruntime-genai {version('onnxruntime-genai')}"


def versions() -> dict[str, str]:
    """Name of this exporter and the versions of what it used, for the manifest."""
    names = ("onnxruntime-genai", "transformers", "torch", "onnx", "onnx-ir")
    return {"name": "genai"} | {name: version(name) for name in names}
