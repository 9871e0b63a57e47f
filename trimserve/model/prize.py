"""The prize: what trimming to K ids can win at most, by the bytes of the weights."""

from collections.abc import Iterable
from dataclasses import dataclass

from trimserve.files.tensors import TensorSpec
from trimserve.model.source import HEAD_MATRIX, ModelSource

_HEAD_CLASSES = (
    "ForCausalLM",
    "LMHeadModel",
    "WithLMHead",
    "ForConditionalGeneration",
    "MTModel",
    "ForMaskedLM",
)


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes of a model's weights, a tied tensor once, parted by what a decode step does with them.

    Attributes:
        vocab_size: V.
        rows: bytes of all tensors with a vocab axis.
        head: bytes of those that are multiplied with every hidden state: the head's matrix (the embedding,
            if tied) and its bias; 0 for a model without a head over the vocab.
        body: bytes of the other weights that a decode step reads.
        encoder: bytes of an encoder beside a decoder, which are read once a text.
    """

    vocab_size: int
    rows: int
    head: int
    body: int
    encoder: int = 0

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return self.rows + self.body + self.encoder

    def at(self, kept: int, head_rows: int | None = None) -> int:
        """Bytes of all weights with K ids kept; cold rows are not among them.

        Args:
            kept: K.
            head_rows: rows of the head of an untied model where they are fewer.
        """
        less = 0.0 if head_rows is None else self.head * (self._share(kept) - self._share(head_rows))
        return self.total - round(self.rows * (1 - self._share(kept)) + less)

    def decode_ratio(self, kept: int) -> float | None:
        """Weight bytes that the full model reads for one token over those at K rows of the head, or None.

        Each weight is read once a token, but an encoder's, and the embedding's, of which a token needs a row.
        """
        if self.head == 0:
            return None
        return (self.body + self.head) / (self.body + self.head * self._share(kept))

    def _share(self, kept: int) -> float:
        return min(kept, self.vocab_size) / self.vocab_size


@dataclass(frozen=True, slots=True)
class VocabSpecs:
    """A model's tensors as the headers of its files tell them.

    Attributes:
        tables: those with a vocab axis that are looked up or multiplied, copies left out.
        heads: of `tables`, those that are a head by their name.
        biases: vectors of V numbers.
        copies: of a tied model, the head that is stored a second time.
        others: all without a vocab axis.
    """

    tables: tuple[TensorSpec, ...]
    heads: tuple[TensorSpec, ...]
    biases: tuple[TensorSpec, ...]
    copies: tuple[TensorSpec, ...]
    others: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors with a vocab axis, copies left out."""
        return _bytes(self.tables) + _bytes(self.biases)


def read_vocab_specs(source: ModelSource) -> VocabSpecs:
    """Tell a model's vocab tensors by the headers of its files.

    A tensor has a vocab axis if one of its first two axes is as long as the vocab. An export asks the
    model's class instead, which takes torch: another axis may have that length by chance.
    """
    specs = [spec for specs, _ in source.headers.values() for spec in specs.values()]
    rows = [spec for spec in specs if source.vocab_size in spec.shape[:2] and len(spec.shape) <= 2]
    matrices = [spec for spec in rows if min(spec.shape) > 1 and len(spec.shape) == 2]
    heads = [spec for spec in rows if HEAD_MATRIX.search(spec.name)]
    copies = heads if source.tied and len(matrices) > len(heads) else []
    return VocabSpecs(
        tables=tuple(spec for spec in matrices if spec not in copies),
        heads=tuple(spec for spec in heads if spec not in copies),
        biases=tuple(spec for spec in rows if spec not in matrices),
        copies=tuple(copies),
        others=tuple(spec for spec in specs if spec not in rows),
    )


def read_weight_bytes(source: ModelSource) -> WeightBytes | None:
    """Read the bytes of a model's weights from the headers of its files; None where there are none.

    See `read_vocab_specs` for how vocab tensors are told.
    """
    if not source.has_weights:
        return None
    found = read_vocab_specs(source)
    encoder = _bytes(spec for spec in found.others if _is_encoders(spec, source))
    return WeightBytes(
        vocab_size=source.vocab_size,
        rows=found.nbytes,
        head=_head_bytes(source, found),
        body=_bytes(found.others) - encoder,
        encoder=encoder,
    )


def _head_bytes(source: ModelSource, found: VocabSpecs) -> int:
    if found.heads:
        return _bytes(found.heads) + _bytes(found.biases)
    architectures = source.config.get("architectures") or [""]
    has_head = str(architectures[0]).endswith(_HEAD_CLASSES)
    return max((spec.nbytes for spec in found.tables), default=0) + _bytes(found.biases) if has_head else 0


def _is_encoders(spec: TensorSpec, source: ModelSource) -> bool:
    beside = source.config.get("is_encoder_decoder") is True
    return beside and spec.name.removeprefix("model.").startswith("encoder.")


def _bytes(specs: Iterable[TensorSpec]) -> int:
    return sum(spec.nbytes for spec in specs)
