"""Under which names checkpoints store a tensor of a model class."""

import re
from collections.abc import Iterable, Sequence

# Modules that torch puts around a part of a model, in the middle of a name: torch.compile, FSDP, activation
# checkpointing, Lightning with DeepSpeed.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
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
