"""Under which names checkpoints store a tensor of a model class."""

from collections.abc import Iterable, Sequence


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
