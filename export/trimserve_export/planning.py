"""Settle what an export will do before anything is written: task, exporter, what is done around the graph."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from trimserve.errors import UnsupportedModelError, UsageError
from trimserve.files.quantized import Quantization
from trimserve.folder.tasks import GENERATOR_TASKS, TEXT2TEXT_TASK, has_vocab_head
from trimserve.model.source import ModelSource
from trimserve.vocab.map import VocabMap
from trimserve_export.checkpoint.axes import ModelClass, load_config
from trimserve_export.checkpoint.generation_settings import read_generation
from trimserve_export.checkpoint.head_ids import check_task_of_head
from trimserve_export.checkpoint.sentence_config import Declared, read_declared, task_of_modules
from trimserve_export.checkpoint.sentence_modules import is_sentence_transformers
from trimserve_export.checkpoint.tasks import check_task, infer_task, task_class
from trimserve_export.exporters.choice import Choice, choose_exporter
from trimserve_export.exporters.exporter import GraphJob
from trimserve_export.layouts.segmentation import Sample
from trimserve_export.options import Options
from trimserve_export.serving.calibration import Calibration
from trimserve_export.serving.quantize import quantization_of

logger = logging.getLogger(__name__)

# What a weight takes at most that has 4 bits, with its share of a scale and a minimum: Q4_1.
_FOUR_BITS = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is settled before anything is written.

    Attributes:
        source: the model, a checkpoint.
        vocab: the kept ids.
        options: what was asked for.
        task: one of `tasks.TASKS`.
        model_class: what loads the weights.
        choice: what makes the graph; None where none is made.
        declared: what sentence-transformers does around the graph, where the task has that.
        sample: texts to compare a cut tokenizer with the original one on.
        calibration: texts to quantise by, or what such texts gave before.
        generation: see `Manifest.generation`.
    """

    source: ModelSource
    vocab: VocabMap
    options: Options
    task: str
    model_class: ModelClass
    choice: Choice | None
    declared: Declared | None
    sample: Sample | None = None
    calibration: Iterable[str] | Calibration | None = None
    generation: dict[str, Any] | None = None

    @property
    def job(self) -> GraphJob:
        """What the exporter is to make."""
        return _job(self.task, self.options)

    @property
    def quantization(self) -> Quantization | None:
        """How the weights are quantised, if at all."""
        options = self.options
        if options.quantize is None:
            return None
        return quantization_of(
            options.quantize,
            options.vocab_bits,
            vocab_block=self.source.gguf.head_block if self.source.gguf is not None else None,
            by_exporter=self.job.quantize is not None,
            keeps=_has_four_bits(self.source),
        )

    @property
    def scheme(self) -> Quantization | None:
        """How the graph is quantised after it was exported, if at all."""
        return None if self.job.quantize is not None else self.quantization


def _has_four_bits(source: ModelSource) -> bool:
    """Whether most of a model was quantised to 4 bits before."""
    if source.packed is not None:
        return source.packed.bits <= 4
    return source.gguf is not None and source.gguf.bits_a_weight <= _FOUR_BITS


def _job(task: str, options: Options) -> GraphJob:
    # What runs on a CPU is quantised here, whoever exported it; graphs for other devices by their builder.
    quantize = None if options.device == "cpu" else options.quantize
    return GraphJob(task, options.dtype, quantize, options.device, options.trust_remote_code)


def plan_export(
    source: ModelSource,
    vocab: VocabMap,
    options: Options,
    sample: Sample | None = None,
    calibration: Iterable[str] | Calibration | None = None,
) -> Plan:
    """Settle what will be done with a checkpoint.

    Raises:
        UnsupportedModelError: the model, or a task or layout for it, is not supported.
    """
    config = load_config(source.path, trust_remote_code=options.trust_remote_code)
    task = options.task
    if task == "auto":
        task = task_of_modules(source) if is_sentence_transformers(source) else infer_task(config)
    check_task(task)
    check_task_of_head(vocab, task)
    if options.vocab_bits is not None and not has_vocab_head(task):
        raise UsageError(
            f"vocab bits say how the rows of a vocab head are rounded, and {task} has none: leave them out."
        )
    choice = choose_exporter(options.exporter, config, _job(task, options)) if options.to == "onnx" else None
    _check_pad_is_kept(config, task, vocab)
    if options.layout != "runtime" and options.to == "onnx" and task == TEXT2TEXT_TASK:
        raise UnsupportedModelError(
            f"layout {options.layout} takes one graph of a checkpoint, and an encoder-decoder is exported as "
            "several: use --layout runtime, --layout tokenizer with --to safetensors, or pass -m the folder "
            "that optimum-onnx makes of the full model."
        )
    if options.quantize and options.dtype == "bf16" and options.writes_cold:
        raise UnsupportedModelError(
            "cold rows in blocks with bf16 scales are not built: choose --dtype fp16, or --no-cold."
        )
    declared = read_declared(source, task, config)
    check_cold(declared, options)
    logger.info("%s: task %s, %s of %s rows", source.name, task, len(vocab), vocab.vocab_size)
    generation = None
    if task in GENERATOR_TASKS and options.layout == "runtime" and options.to == "onnx":
        generation = read_generation(source, trust_remote_code=options.trust_remote_code)
    model_class = task_class(task, config)
    return Plan(source, vocab, options, task, model_class, choice, declared, sample, calibration, generation)


def check_cold(declared: Declared | None, options: Options) -> None:
    """Refuse to leave out rows that every vector of a sparse encoder needs.

    Raises:
        UsageError: see above.
    """
    if declared is not None and declared.settings.is_sparse and not options.cold:
        raise UsageError(
            "a sparse encoder gives a weight for every token id, so it needs the rows that were not kept: "
            "leave --no-cold out."
        )


def _check_pad_is_kept(config: PretrainedConfig, task: str, vocab: VocabMap) -> None:
    # A decoder that classifies looks for the last token that is not the pad id.
    pad = config.get_text_config().pad_token_id
    if task == "text-classification" and pad is not None and pad not in vocab.kept_ids:
        raise UnsupportedModelError(
            f"{task} needs the pad id {pad}, which this vocab does not keep: "
            "select again (trimserve select keeps it, it is structural)."
        )
