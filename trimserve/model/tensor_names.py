"""Under which names checkpoints store a tensor of a model class."""

import re
from collections.abc import Iterable, Sequence

# Modules that torch puts around a part of a model, in the middle of a name: torch.compile, FSDP, activation
# checkpointing, Lightning with DeepSpeed.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# Where a model of several modalities keeps its language model: below its base model, or beside it.
_LANGUAGE_MODEL = re.compile(r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(?=.)")
_HEADS = ("lm_head.", "score.")
# DataParallel and its like; a model may have a module of that name itself.
_PARALLEL = "module."


def stored_names(names: Sequence[str], prefixes: Iterable[str]) -> list[str]:
    """Names that a checkpoint may store a tensor by, the class's own first.

    A checkpoint of the bare model has no prefix, one of a model with a head has it; transformers loads each
    in the other.

    Args:
        names: parameter names of the tensor in the model's class; several if it is tied.
        prefixes: `base_model_prefix` of the classes that may have saved it.

    Example:
        >>> stored_names(["bert.embeddings.weight"], ["bert"])
        ['bert.embeddings.weight', 'embeddings.weight', 'bert.bert.embeddings.weight']
    """
    candidates = list(names)
    for prefix in prefixes:
        candidates += [name.removeprefix(f"{prefix}.") for name in names]
        candidates += [f"{prefix}.{name}" for name in names]
    return list(dict.fromkeys(candidates))


def unwrapped_names(names: Sequence[str]) -> dict[str, str]:
    """The names that a checkpoint's tensors have in their model, by the names that they are stored by.

    A training loop that saves the state of `torch.compile(model)` or `DataParallel(model)` stores names of
    the wrapper, which no library loads.

    Args:
        names: all names of a checkpoint, of every file.

    Example:
        >>> unwrapped_names(["module.wte._orig_mod.weight", "module.head.weight"])
        {'module.wte._orig_mod.weight': 'wte.weight', 'module.head.weight': 'head.weight'}
        >>> unwrapped_names(["module.weight", "head.weight"])
        {'module.weight': 'module.weight', 'head.weight': 'head.weight'}
    """
    plain = [_WRAPPERS.sub("", name) for name in names]
    while plain and all(name.startswith(_PARALLEL) for name in plain):
        plain = [name.removeprefix(_PARALLEL) for name in plain]
    return dict(zip(names, plain, strict=True))


def language_names(names: Iterable[str]) -> dict[str, str]:
    """The names that tensors of a multimodal model have in its language model alone, by the stored ones.

    What belongs to no language model (a vision tower, a projector) is left out. Where nothing is said to
    belong to one, all names stand as they are.

    Example:
        >>> language_names(["language_model.model.norm.weight", "lm_head.weight", "vision_tower.norm.weight"])
        {'language_model.model.norm.weight': 'model.norm.weight', 'lm_head.weight': 'lm_head.weight'}
        >>> language_names(["model.language_model.norm.weight", "model.visual.norm.weight"])
        {'model.language_model.norm.weight': 'model.norm.weight'}
    """
    found = {name: _LANGUAGE_MODEL.sub("", name) for name in names}
    if all(inner == name for name, inner in found.items()):
        return found
    return {
        name: inner if inner.startswith(_HEADS) else f"model.{inner}"
        for name, inner in found.items()
        if inner != name or inner.startswith(_HEADS)
    }
