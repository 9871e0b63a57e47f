"""Tasks: which one a checkpoint was made for, the class that loads it, and how it is loaded."""

from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from trimserve.errors import UnsupportedModelError
from trimserve.folder.tasks import (
    ANSWERING_TASK,
    GENERATION_TASK,
    TEXT2TEXT_TASK,
    Task,
)
from trimserve_export.checkpoint.axes import ModelClass, architecture_class
from trimserve_export.checkpoint.library import transformers_border

# Each with the class that loads it.
TASK_CLASSES: dict[str, ModelClass] = {
    "feature-extraction": transformers.AutoModel,
    "fill-mask": transformers.AutoModelForMaskedLM,
    "text-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    ANSWERING_TASK: transformers.AutoModelForQuestionAnswering,
    GENERATION_TASK: transformers.AutoModelForCausalLM,
    TEXT2TEXT_TASK: transformers.AutoModelForSeq2SeqLM,
}
TASKS = tuple(TASK_CLASSES)
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TASK_OF_HEAD: dict[str, Task] = {
    "ForCausalLM": "text-generation-with-past",
    "LMHeadModel": "text-generation-with-past",
    "ForMaskedLM": "fill-mask",
    "ForPreTraining": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": ANSWERING_TASK,
    "Model": "feature-extraction",
}
# Encoder-decoders whose encoder has a class of its own.
_ENCODERS_OF_PAIRS = frozenset({"t5", "mt5", "umt5"})
_TEXT2TEXT_HEADS = ("ForConditionalGeneration", "MTModel")


def infer_task(config: PretrainedConfig) -> Task:
    """Tell the task of a checkpoint by its architecture.

    Raises:
        UnsupportedModelError: no architecture, or one whose task is not known or not built yet.
    """
    name = next(iter(config.architectures or ()), "")
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
    """The class that loads a model for a task.

    Hidden states of an encoder-decoder are those of its encoder alone, as sentence-transformers takes them. A
    multimodal checkpoint is loaded whole, in the class that it was saved from.

    Args:
        task: one of `TASKS`.
        config: the model's config.
    """
    encoder: ModelClass = transformers.AutoModelForTextEncoding
    if task == "feature-extraction" and config.model_type in _ENCODERS_OF_PAIRS:
        return encoder
    is_multimodal = config.get_text_config() is not config and not config.is_encoder_decoder
    if task == GENERATION_TASK and is_multimodal and (whole := architecture_class(config)) is not None:
        return whole
    return TASK_CLASSES[task]


def check_task(task: str) -> None:
    """Refuse a task that is not one of `TASKS`.

    Raises:
        UnsupportedModelError: see above.
    """
    if task not in TASK_CLASSES:
        raise UnsupportedModelError(f"task {task!r} is not known: expected one of {', '.join(TASKS)}.")


def load_model(folder: Path, task: str, dtype: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a checkpoint for inference on the CPU.

    Args:
        folder: config.json and safetensors weights.
        task: one of `TASKS`.
        dtype: fp32, fp16 or bf16; the weights are converted to it.
        trust_remote_code: allow code that the model folder brings.

    Raises:
        UnsupportedModelError: weights that the task needs are not in the checkpoint.
    """
    with transformers_border(f"cannot load the model for {task}"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model, report = task_class(task, config).from_pretrained(
            folder,
            config=config,
            dtype=TORCH_DTYPES[dtype],
            **_attention(config),
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


def _attention(config: PretrainedConfig) -> dict[str, str]:
    """Plain torch where attention's logits are capped (Gemma 2): transformers 4 forgets the cap elsewhere."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return {"attn_implementation": "eager"} if capped else {}
