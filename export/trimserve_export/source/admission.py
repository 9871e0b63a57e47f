"""Refuse a model early, before a corpus is read: one place for export and inspect."""

from trimserve.model.quantized import check_floats
from trimserve.model.source import ModelSource
from trimserve_export.checkpoint.axes import load_config
from trimserve_export.from_graph.feedable import check_feedable
from trimserve_export.trimming.parts import find_parts, main_part, one_variant


def check_source(
    source: ModelSource, *, task: str = "auto", layout: str = "runtime", trust_remote_code: bool = False
) -> None:
    """Refuse a model that cannot be trimmed, by what its files say; no tensor is read.

    Args:
        source: the model, a checkpoint or a graph.
        task: ``"auto"`` or one of the runtime's tasks.
        layout: where ids are to be remapped; graphs for other runtimes may have any inputs and sizes.
        trust_remote_code: allow code that the model folder brings.

    Raises:
        UnsupportedModelError: weights in another format or quantised, a model without a vocab, or a graph
            that takes one shape of input or what the runtime does not feed.
        MismatchError: a file is damaged, or a pointer in its place.
        UsageError: there are no weights, or they lie in a subfolder.
    """
    if source.graph is None:
        _ = source.weight_files  # says what is there instead
        if source.gguf is None:  # whose rows are dequantised
            check_floats(source)
        if not source.is_static_embedding and (source.config or not _is_of_modules(source)):
            load_config(source.path, trust_remote_code=trust_remote_code)
    elif layout == "runtime":
        parts = one_variant(find_parts(source))
        check_feedable(source, parts, main_part(list(parts.values()), source), task)


def _is_of_modules(source: ModelSource) -> bool:
    """Whether sentence-transformers tells what the model is; static embeddings have no config."""
    return any((folder / "modules.json").is_file() for folder in (source.path, source.path.parent))
