"""The graphs of a folder: the parts of a model, each perhaps in several variants of precision.

optimum writes `encoder_model.onnx` beside `decoder_model.onnx`; folders for transformers.js hold a file a
part and a variant: `onnx/decoder_model_merged_q4f16.onnx`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimserve.errors import UsageError
from trimserve.folder.names import GRAPH_FOLDER
from trimserve.model.source import ModelSource

# The names that have a meaning; the longest that fits counts.
ENCODER, FIRST, LATER, MERGED = (
    "encoder_model",
    "decoder_model",
    "decoder_with_past_model",
    "decoder_model_merged",
)
_PARTS = (MERGED, LATER, FIRST, ENCODER, "model", "embed_tokens")
# Where the task, dtype and quantisation of a model are read, in this order.
_MAIN_PARTS = ("model", LATER, MERGED, FIRST)
_VARIANTS = re.compile(r"(?:_(fp32|fp16|q\d\w*|int8|uint8|quantized|bnb4|bf16))?")


@dataclass(frozen=True, slots=True)
class Part:
    """A graph of a folder.

    Attributes:
        name: which part of the model it is, e.g. ``"model"`` or ``"encoder_model"``; of a file with
            another name that name.
        variant: e.g. ``"q4"``; empty for the plain file.
        path: the file.
        folder: ``"onnx"`` or ``""``: where in the model's folder it lies.
    """

    name: str
    variant: str
    path: Path
    folder: str

    @property
    def role(self) -> str:
        """What the manifest calls it."""
        return f"{self.name}_{self.variant}" if self.variant else self.name

    @property
    def file_name(self) -> str:
        """Its path in a folder laid out like the source's."""
        return f"{self.folder}/{self.path.name}" if self.folder else self.path.name


def find_parts(source: ModelSource) -> list[Part]:
    """Find the graphs that make up a model, in all its variants or the one that the source names.

    Args:
        source: a model with a graph. Its variant ``"fp32"`` is the plain file, unless another is called so.

    Returns:
        The graph that the user, or the folder's genai config, names; else every graph of its folder.

    Raises:
        UsageError: the folder has no such variant.
    """
    graph = source.graph
    if graph is None:
        return []
    folder = GRAPH_FOLDER if graph.parent == source.path / GRAPH_FOLDER else ""
    alone = source.named_graph is not None or bool(source.genai_model)
    parts = [_part(path, folder) for path in ([graph] if alone else sorted(graph.parent.glob("*.onnx")))]
    if source.variant is None:
        return parts
    names = {part.variant for part in parts}
    wanted = "" if source.variant == "fp32" and "fp32" not in names else source.variant
    if wanted not in names:
        found = ", ".join(sorted(name or "fp32" for name in names))
        raise UsageError(f"{source.name} has no variant {source.variant!r}: it has {found}.")
    return [part for part in parts if part.variant == wanted]


def _part(path: Path, folder: str) -> Part:
    for name in _PARTS:
        if path.stem.startswith(name) and (match := _VARIANTS.fullmatch(path.stem[len(name) :])):
            return Part(name, match[1] or "", path, folder)
    return Part(path.stem, "", path, folder)


def one_variant(parts: Sequence[Part]) -> dict[str, Part]:
    """The parts of one variant by name: the plain files, or the only variant that there is.

    Raises:
        UsageError: there are several variants and no plain one.
    """
    names = {part.variant for part in parts}
    if "" not in names and len(names) > 1:
        found = ", ".join(sorted(names))
        raise UsageError(f"the model has the variants {found}, and this layout takes one: pass --variant.")
    wanted = "" if "" in names else next(iter(names))
    return {part.name: part for part in parts if part.variant == wanted}


def main_part(parts: Sequence[Part], source: ModelSource) -> Part:
    """The part that tells most of the model."""
    named = {part.name: part for part in parts}
    found = next((named[name] for name in _MAIN_PARTS if name in named), None)
    return found or next((part for part in parts if part.path == source.graph), parts[0])
