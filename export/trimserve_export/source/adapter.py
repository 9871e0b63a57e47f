"""Merge an adapter (LoRA and its like) into its base with peft: the checkpoint of peft's own merge."""

import re
import shutil
import warnings
from pathlib import Path
from typing import Any, Final

import transformers
from torch import nn
from transformers import PreTrainedModel

from trimserve.errors import MismatchError, UnsupportedModelError, UsageError, require
from trimserve.files.tensors import TensorSpec, read_header
from trimserve.folder.names import ADAPTER_CONFIG
from trimserve.foreign import foreign
from trimserve.model.source import CONFIG_NAME, ModelSource
from trimserve_export.checkpoint.axes import architecture_class, load_config
from trimserve_export.checkpoint.library import transformers_border
from trimserve_export.exporters import tracing
from trimserve_export.source.adapter_files import copy_small_files, load_base, set_labels
from trimserve_export.source.admission import check_source

_WEIGHTS: Final = "adapter_model.safetensors"
_CLASSES: Final[dict[str, Any]] = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
_LABELLED: Final = ("SEQ_CLS", "TOKEN_CLS")
_PREFIX: Final = "base_model.model."


def merge_adapter(
    base: ModelSource, adapter: ModelSource, target: Path, *, trust_remote_code: bool = False
) -> ModelSource:
    """Write the checkpoint of a model with an adapter merged into it, in the base's stored dtype.

    Args:
        base: a checkpoint.
        adapter: a folder with adapter_config.json and adapter_model.safetensors. Its own tokenizer files
            replace the base's.
        target: an existing empty folder.
        trust_remote_code: allow code that the base's folder brings.

    Raises:
        MissingExtraError: peft is not installed.
        UnsupportedModelError: the base cannot be read or is quantised, or the adapter cannot be merged.
        MismatchError: the adapter does not fit the base.
        UsageError: there is no adapter, or no weights of it.
    """
    stored = _stored(adapter)
    if base.graph is not None:
        raise UsageError(
            f"{base.name} is an ONNX graph, which no adapter can be merged into: pass its checkpoint."
        )
    check_source(base, trust_remote_code=trust_remote_code)
    peft = require("peft", extra="adapter", purpose=f"merging the adapter {adapter.name}")
    config = _read_config(peft, adapter)
    if config.is_prompt_learning:
        raise UnsupportedModelError(
            f"{adapter.name} is a {config.peft_type.value} adapter, which adds to the prompt and not to the "
            "weights: it cannot be merged into a model."
        )
    with tracing.quiet():
        model = _load(base, config.task_type, stored, trust_remote_code=trust_remote_code)
        resized = _resize(model, stored)
        tied = bool(model.config.get_text_config().tie_word_embeddings)
        merged = _merge(peft, model, base, adapter)
        untied = tied and _untie(merged)
        merged.save_pretrained(target)
    if _same_class(base, merged) and not resized and not untied:
        shutil.copyfile(base.path / CONFIG_NAME, target / CONFIG_NAME)
    copy_small_files(base.path, adapter.path, target)
    files = (*base.weight_files, adapter.path / _WEIGHTS, adapter.path / ADAPTER_CONFIG)
    return ModelSource(base.name, base.revision, target, made_of=files, adapter=adapter.name)


def _read_config(peft: Any, adapter: ModelSource) -> Any:  # noqa: ANN401 - peft has types of its own
    path = adapter.path / ADAPTER_CONFIG
    advice = "save the adapter again with its save_pretrained."
    if adapter.read_json(ADAPTER_CONFIG).get("peft_type") is None:
        raise MismatchError(f"{path} has no peft_type, which says what the adapter is: {advice}")
    with foreign(f"{path} is no config that peft {peft.__version__} reads", advice=advice), tracing.quiet():
        return peft.PeftConfig.from_pretrained(adapter.path)


def _stored(adapter: ModelSource) -> dict[str, TensorSpec]:
    if not (adapter.path / ADAPTER_CONFIG).is_file():
        raise UsageError(f"{adapter.name} has no {ADAPTER_CONFIG}, so it is no adapter: check --adapter.")
    if not (adapter.path / _WEIGHTS).is_file():
        pickled = (adapter.path / "adapter_model.bin").is_file()
        raise UsageError(
            f"{adapter.name} has no {_WEIGHTS}{', only a pickle' if pickled else ''}: save the adapter again "
            "with a current peft's save_pretrained."
        )
    return read_header(adapter.path / _WEIGHTS)[0]


def _load(
    base: ModelSource, task: str | None, stored: dict[str, TensorSpec], *, trust_remote_code: bool
) -> PreTrainedModel:
    """The base in the class that the adapter was trained in."""
    config = load_config(base.path, trust_remote_code=trust_remote_code)
    model_class = _CLASSES.get(task or "") or architecture_class(config) or transformers.AutoModel
    labelled = task in _LABELLED and set_labels(config, stored)
    model, missing = load_base(
        model_class,
        base,
        config,
        {name.removeprefix(_PREFIX) for name in stored},
        purpose=f"for {task}",
        labelled=labelled,
        trust_remote_code=trust_remote_code,
    )
    if missing is not None:
        raise MismatchError(
            f"neither {base.name} nor the adapter has {missing}, which {task} needs: pass the "
            "model that the adapter was trained on with -m."
        )
    return model


def _resize(model: PreTrainedModel, stored: dict[str, TensorSpec]) -> bool:
    """Give the vocab matrices the rows that the adapter brings: of tokens that were added for it."""
    table: Any = model.get_input_embeddings()
    tables = (table, _head_of(model))
    names = {name for name, module in model.named_modules() if any(module is table for table in tables)}
    rows = {
        spec.shape[0]
        for name, spec in stored.items()
        if re.sub(r"(\.base_layer)?\.weight$", "", name.removeprefix(_PREFIX)) in names
        and name.endswith("weight")
    }
    if not rows - {table.weight.shape[0]}:
        return False
    with transformers_border("cannot resize the embedding to the adapter's", error=MismatchError):
        model.resize_token_embeddings(max(rows), mean_resizing=False)
    return True


def _merge(peft: Any, model: PreTrainedModel, base: ModelSource, adapter: ModelSource) -> PreTrainedModel:  # noqa: ANN401
    subject = f"the adapter {adapter.name} cannot be merged into {base.name}"
    advice = "pass the model that it was trained on with -m."
    with foreign(subject, advice=advice), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        merged = peft.PeftModel.from_pretrained(model, adapter.path).merge_and_unload()
    return merged  # type: ignore[no-any-return]


def _untie(model: PreTrainedModel) -> bool:
    """Let the config say so where the adapter brought a head of its own for a tied model."""
    head = _head_of(model)
    text = model.config.get_text_config()
    if head is None or head.weight is model.get_input_embeddings().weight:
        return False
    model.config.tie_word_embeddings = text.tie_word_embeddings = False
    return True


def _head_of(model: PreTrainedModel) -> nn.Module | None:
    return model.get_output_embeddings()  # type: ignore[no-untyped-call, no-any-return]


def _same_class(base: ModelSource, merged: PreTrainedModel) -> bool:
    return type(merged).__name__ in (base.config.get("architectures") or [])
