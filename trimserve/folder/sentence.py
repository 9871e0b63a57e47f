"""What sentence-transformers does around a model, as a trimmed folder keeps it: two files.

The originals lie in folders of their own (`1_Pooling/config.json`, `2_Dense/model.safetensors`), in formats
that changed over the years. They are read and checked once, at export; a trimmed folder has them in one form.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import numpy as np
from msgspec import Meta

from trimserve.arrays import Floats
from trimserve.errors import MismatchError, UsageError
from trimserve.files.checked_json import convert_json, parse_json
from trimserve.files.tensors import ArrayTensor, exhaust, map_tensor, read_header, to_float32, write_tensors
from trimserve.folder.names import SENTENCE_NAME, SENTENCE_TENSORS_NAME
from trimserve.folder.opening import TrimmedFolder

# The classes of sentence-transformers that a folder may be made for.
Kind = Literal["SentenceTransformer", "SparseEncoder", "CrossEncoder"]
KINDS: tuple[Kind, ...] = ("SentenceTransformer", "SparseEncoder", "CrossEncoder")
# What modules hand on to each other.
TOKENS, SENTENCE, SCORES = "token_embeddings", "sentence_embedding", "scores"
PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
POOLING_MODES: tuple[PoolingMode, ...] = get_args(PoolingMode)
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
SIMILARITIES: tuple[Similarity, ...] = get_args(Similarity)
Above0 = Annotated[int, Meta(ge=1, le=1 << 53)]


@dataclass(frozen=True, slots=True)
class Pooling:
    """Token vectors to one vector a text; several modes are put one behind the other.

    Attributes:
        modes: of `POOLING_MODES`.
        include_prompt: whether the prompt's tokens count.
    """

    type: ClassVar[str] = "Pooling"
    modes: Annotated[tuple[PoolingMode, ...], Meta(min_length=1)] = ("mean",)
    include_prompt: bool = True


@dataclass(frozen=True, slots=True)
class SpladePooling:
    """Logits over the vocab to one weight for each token id.

    Attributes:
        strategy: ``"max"`` or ``"sum"`` over the text's tokens.
        activation: ``"relu"`` for log(1 + relu(x)), ``"log1p_relu"`` for the logarithm twice.
    """

    type: ClassVar[str] = "SpladePooling"
    strategy: Literal["max", "sum"] = "max"
    activation: Literal["relu", "log1p_relu"] = "relu"


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer and its activation; tensors `weight`, and maybe `bias` and `residual`.

    Attributes:
        activation: of `activations.ACTIVATIONS`.
        input: what it reads.
        output: what it writes.
        residual: add the input, or the input times `residual` where there is one.
    """

    type: ClassVar[str] = "Dense"
    activation: str = "Tanh"
    input: str = SENTENCE
    output: str = SENTENCE
    residual: bool = False


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Layer normalisation of the embedding; tensors `weight` and `bias`."""

    type: ClassVar[str] = "LayerNorm"


@dataclass(frozen=True, slots=True)
class Normalize:
    """Scale the embedding to length 1."""

    type: ClassVar[str] = "Normalize"


Module = Pooling | SpladePooling | Dense | LayerNorm | Normalize
_MODULES: dict[str, type[Module]] = {
    known.type: known for known in (Pooling, SpladePooling, Dense, LayerNorm, Normalize)
}


@dataclass(frozen=True, slots=True)
class SentenceSettings:
    """Everything between a text and its embedding or score that is not the graph.

    Attributes:
        kind: the class of sentence-transformers that the folder was made for.
        modules: what comes after the transformer, in order; tensors of module i are called ``"i.weight"``.
        graph_output: what the graph gives the first module: token vectors, or where all modules are in the
            graph the embedding itself; ``"scores"`` for a classification head.
        prompts: name -> text that is put before each text.
        default_prompt_name: the prompt where none is asked for.
        similarity: how embeddings are compared, of `SIMILARITIES`.
        truncate_dim: numbers of an embedding that stay, counted from the first; None for all.
        max_active_dims: weights of a sparse vector that stay, the largest; None for all.
        max_tokens: longest input, special tokens included; None where the tokenizer's own limit holds.
        special_tokens: let the tokenizer add its special tokens.
        prompt_ends: token ids that do not count as a prompt's where they stand at its end: those that the
            source's library calls special. Only for a pooling that leaves the prompt out.
        type_ids: feed the tokenizer's `token_type_ids`; zeros where the source's library leaves them out.
        activation: of a cross encoder's scores, of `activations.ACTIVATIONS`.
        no_pairs: why pairs cannot be scored, as the end of a sentence; None where they can.
    """

    kind: Kind = "SentenceTransformer"
    modules: tuple[Module, ...] = (Pooling(),)
    graph_output: str = TOKENS
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity: Similarity = "cosine"
    truncate_dim: Above0 | None = None
    max_active_dims: Above0 | None = None
    max_tokens: Above0 | None = None
    special_tokens: bool = True
    prompt_ends: tuple[int, ...] = ()
    type_ids: bool = True
    activation: str = "Identity"
    no_pairs: str | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether embeddings have one number for each token id, most of them 0."""
        return any(isinstance(module, SpladePooling) for module in self.modules)

    @property
    def drops_prompt(self) -> bool:
        """Whether a pooling leaves the prompt's tokens out."""
        return any(isinstance(module, Pooling) and not module.include_prompt for module in self.modules)

    def prompt(self, name: str | None, text: str | None) -> str:
        """What is put before each text; empty for nothing.

        Args:
            name: one of `prompts`.
            text: the prompt itself.

        Raises:
            UsageError: both are given, or there is no prompt of this name.
        """
        if name is not None and text is not None:
            raise UsageError("both a prompt and the name of one were given: leave one of them out.")
        if text is not None:
            return text
        chosen = self.default_prompt_name if name is None else name
        if chosen is None:
            return ""
        if chosen not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none"
            raise UsageError(f"there is no prompt {chosen!r}: the folder has {known}.")
        return self.prompts[chosen]

    def to_json(self) -> str:
        """Serialise with stable key order and a final newline."""
        modules = [{"type": module.type} | dataclasses.asdict(module) for module in self.modules]
        content = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        document = content | {"modules": modules, "prompts": dict(self.prompts)}
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: str) -> Self:
        """Parse what `to_json` wrote.

        Raises:
            MismatchError: it is not that.
        """
        advice = "export the folder again."
        raw = parse_json(text, origin, advice=advice)
        listed = raw.get("modules") if isinstance(raw, dict) else None
        if not isinstance(raw, dict) or not isinstance(listed, list):
            raise MismatchError(f"{origin} should hold an object with a list of modules: {advice}")
        rest = {key: value for key, value in raw.items() if key != "modules"}
        told: Any = convert_json(rest, _all_but_modules(), origin, advice=advice)
        modules = tuple(_module(entry, f"a module of {origin}", advice) for entry in listed)
        settings = cls(**{key: getattr(told, key) for key in rest}, modules=modules)
        settings._check_flow(origin)
        return settings

    def _check_flow(self, origin: str) -> None:
        """Refuse modules that read what none before them writes."""
        there = {SENTENCE if self.is_sparse else self.graph_output}
        for module in self.modules:
            takes, gives = _takes_and_gives(module)
            if takes not in there and not isinstance(module, SpladePooling):
                raise MismatchError(
                    f"{origin}: its {module.type} reads {takes!r}, which nothing before it gives: export the "
                    "folder again."
                )
            there.add(gives)


@functools.cache
def _all_but_modules() -> type:
    """The schema of the settings without their modules, which are of several types by their key `type`."""
    fields = [entry for entry in dataclasses.fields(SentenceSettings) if entry.name != "modules"]
    missing = dataclasses.MISSING
    return dataclasses.make_dataclass(
        "_Settings",
        [
            (entry.name, entry.type, field(default=entry.default))
            if entry.default is not missing
            else (entry.name, entry.type, field(default_factory=dict))
            for entry in fields
        ],
        frozen=True,
    )


def _module(entry: object, origin: str, advice: str) -> Module:
    kind = entry.get("type") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(kind, str) or kind not in _MODULES:
        raise MismatchError(f"{origin} is of no kind that this version knows: {advice}")
    rest = {key: value for key, value in entry.items() if key != "type"}
    return convert_json(rest, _MODULES[kind], origin, advice=advice)


def _takes_and_gives(module: Module) -> tuple[str, str]:
    if isinstance(module, Dense):
        return module.input, module.output
    return (TOKENS if isinstance(module, Pooling) else SENTENCE), SENTENCE


def write_settings(folder: Path, settings: SentenceSettings, tensors: Mapping[str, Floats]) -> None:
    """Write both files into a folder; that of the tensors only where there are some."""
    (folder / SENTENCE_NAME).write_text(settings.to_json(), "utf-8")
    if tensors:
        arrays = {name: ArrayTensor(values) for name, values in tensors.items()}
        exhaust(write_tensors(folder / SENTENCE_TENSORS_NAME, arrays))


def read_settings(folder: TrimmedFolder) -> SentenceSettings:
    """Read the settings of a folder; mean pooling and nothing else where it has none.

    Raises:
        MismatchError: the file is not what this version writes.
    """
    if SENTENCE_NAME not in folder.manifest.files:
        return SentenceSettings()
    file = folder.opened(SENTENCE_NAME)
    return SentenceSettings.from_json(file.read_text(), str(file.path))


def read_tensors(folder: TrimmedFolder) -> dict[str, Floats]:
    """Read the modules' tensors, float32 each, into memory; they are small beside the graph."""
    if SENTENCE_TENSORS_NAME not in folder.manifest.files:
        return {}
    specs, _ = read_header(folder.opened(SENTENCE_TENSORS_NAME))
    return {name: to_float32(np.array(map_tensor(spec)), spec.dtype) for name, spec in specs.items()}
