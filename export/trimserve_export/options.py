"""What may be asked of an export, checked before anything is read."""

from dataclasses import dataclass
from typing import get_args

from trimserve.errors import UsageError
from trimserve.folder.manifest import Dtype, Layout
from trimserve_export.checkpoint.tasks import TASKS
from trimserve_export.cold_head.sketch import SKETCH_BITS
from trimserve_export.exporters.exporter import DEVICES, EXPORTERS
from trimserve_export.serving.quantize import QUANTIZE


@dataclass(frozen=True, slots=True)
class Options:
    """What to export; see `export`."""

    task: str = "auto"
    exporter: str = "auto"
    dtype: str = "fp32"
    layout: str = "runtime"
    to: str = "onnx"
    cold: bool = True
    trust_remote_code: bool = False
    quantize: str | None = None
    vocab_bits: int | None = None
    device: str = "cpu"
    link: bool = False
    variant: str | None = None
    sketch: str | None = None

    def __post_init__(self) -> None:
        _check_choice("task", self.task, {"auto", *TASKS})
        _check_choice("layout", self.layout, set(get_args(Layout)))
        _check_choice("exporter", self.exporter, {"auto", *EXPORTERS})
        _check_choice("dtype", self.dtype, set(get_args(Dtype)))
        _check_choice("device", self.device, set(DEVICES))
        _check_choice("to", self.to, {"onnx", "safetensors", "gguf"})
        if self.to == "gguf":
            _check_gguf(self)
        if self.layout == "graph" and self.to != "onnx":
            raise UsageError(
                "layout graph changes a graph, --to safetensors makes none: choose another layout."
            )
        if self.device != "cpu" and self.exporter not in ("auto", "genai"):
            raise UsageError(
                "device chooses what genai's builder makes: leave it out, or use --exporter genai."
            )
        if self.sketch is not None:
            _check_choice("sketch", self.sketch, {*SKETCH_BITS, "none"})
        if self.vocab_bits is not None:
            _check_vocab_bits(self)
        if self.quantize is not None:
            _check_choice("quantize", self.quantize, set(QUANTIZE))
            _check_quantized(self)

    @property
    def writes_cold(self) -> bool:
        """Whether the folder gets the rows that were not kept: nothing could feed them to a cut tokenizer."""
        return self.cold and self.layout != "tokenizer"


def _check_choice(option: str, value: str, allowed: set[str]) -> None:
    if value not in allowed:
        raise UsageError(f"{option} {value!r} is not known: use {', '.join(sorted(allowed))}.")


def _check_gguf(options: Options) -> None:
    if options.layout != "tokenizer":
        raise UsageError(
            "llama.cpp reads a tokenizer out of the file, so --to gguf cuts it: add --layout tokenizer."
        )
    if options.device != "cpu":
        raise UsageError("device is about a graph and --to gguf makes none: leave it out.")


def _check_vocab_bits(options: Options) -> None:
    if options.vocab_bits not in (4, 8):
        raise UsageError(f"vocab bits should be 4 or 8, found {options.vocab_bits}.")
    if options.quantize is None:
        raise UsageError("vocab bits say how --quantize rounds the vocab's rows: leave them out, or add it.")
    if options.device != "cpu":
        raise UsageError(
            f"graphs for {options.device} are quantised by genai's builder, vocab rows like the body: leave "
            "vocab bits out."
        )


def _check_quantized(options: Options) -> None:
    if options.to == "safetensors":
        raise UsageError("quantize changes a graph and --to safetensors makes none: leave one of them out.")
    if options.dtype == "bf16" and options.device == "cpu" and options.to == "onnx":
        raise UsageError("quantize takes dtype fp32 or fp16: bf16 scales run on no CPU.")
