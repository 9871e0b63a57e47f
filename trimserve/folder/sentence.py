"""What sentence-transformers does around a model, as a trimmed folder keeps it: two files.

The originals lie in folders of their own (`1_Pooling/config.json`, `2_Dense/model.safetensors`), in formats
that changed over the years. They are read and checked once, at export; a trimmed folder has them in one form.
"""

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

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
POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_Count = Annotated[int, Meta(ge=1, le=1 << 31)]
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


@dataclass(frozen=True, slots=True)
class Pooling:
    """Token vectors to one vector a text; several modes are put one behind the other.

    Attributes:
        modes: of `POOLING_MODES`.
        include_prompt: whether the prompt's tokens count.
    """

    type: ClassVar[str] = "Pooling"
    modes: tuple[str, ...] = ("mean",)
    include_prompt: bool = True


@dataclass(frozen=True, slots=True)
class SpladePooling:
    """Logits over the vocab to one weight for each token id.

    Attributes:
        strategy: ``"max"`` or ``"sum"`` over the text's tokens.
        activation: ``"relu"`` for log(1 + relu(x)), ``"log1p_relu"`` for the logarithm twice.
    """

    type: ClassVar[str] = "SpladePooling"
    strategy: str = "max"
    activation: str = "relu"


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


def _default(entry: "dataclasses.Field[Any]") -> Any:  # noqa: ANN401 - whatever make_dataclass takes
    if entry.default_factory is not dataclasses.MISSING:
        return field(default_factory=entry.default_factory)
    return field(default=entry.default)


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
    similarity: str = "cosine"
    truncate_dim: _Count | None = None
    max_active_dims: _Count | None = None
    max_tokens: _Count | None = None
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
        entries = raw.get("modules") if isinstance(raw, dict) else None
        if not isinstance(entries, list):
            raise MismatchError(f"{origin} is not what this version understands: {advice}")
        modules = tuple(_module(entry, origin) for entry in entries)
        subject = f"{origin} is not what this version understands: it"
        rest = convert_json(
            {key: value for key, value in raw.items() if key != "modules"}, _REST, subject, advice=advice
        )
        settings = cls(modules=modules, **vars(rest))
        if settings.similarity not in SIMILARITIES:
            raise MismatchError(
                f"{origin} compares by {settings.similarity!r}, known are {', '.join(SIMILARITIES)}: {advice}"
            )
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


# All but the modules, whose union of classes is told apart by `_module`.
_REST: type[Any] = dataclasses.make_dataclass(
    "_Rest",
    [
        (
            entry.name,
            typing.get_type_hints(SentenceSettings, include_extras=True)[entry.name],
            _default(entry),
        )
        for entry in dataclasses.fields(SentenceSettings)
        if entry.name != "modules"
    ],
)


def _takes_and_gives(module: Module) -> tuple[str, str]:
    if isinstance(module, Dense):
        return module.input, module.output
    return (TOKENS if isinstance(module, Pooling) else SENTENCE), SENTENCE


def _module(entry: object, origin: str) -> Module:
    kind = _MODULES.get(str(entry.get("type"))) if isinstance(entry, dict) else None
    if kind is None or not isinstance(entry, dict):
        raise MismatchError(
            f"{origin} lists a module that this version does not know: export the folder again."
        )
    fields = {key: value for key, value in entry.items() if key != "type"}
    made: Module = convert_json(fields, kind, f"{origin}: its {kind.type}", advice="export the folder again.")
    if isinstance(made, Pooling) and not (made.modes and set(made.modes) <= set(POOLING_MODES)):
        raise MismatchError(
            f"{origin} pools by {', '.join(made.modes) or 'nothing'}, known are {', '.join(POOLING_MODES)}: "
            "export the folder again."
        )
    return made


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
