"""What the checks look at: the folder, its source, the full model's graph, and the texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from trimserve.arrays import Ids
from trimserve.errors import UnknownIdError, UsageError
from trimserve.folder.opening import TrimmedFolder
from trimserve.folder.tasks import has_vocab_head
from trimserve.generation.config import GenerationConfig
from trimserve.model.source import ModelSource
from trimserve.runtime.cold_rows import ColdRows
from trimserve.runtime.session import open_session
from trimserve.text.codec import Codec
from trimserve.vocab.map import VocabMap
from trimserve_export.checkpoint.stored import StoredVocab
from trimserve_export.serving.quantized_embedding import quantized_lookup
from trimserve_export.verify.plain_run import GraphModel, Model, Seq2SeqModel
from trimserve_export.verify.rounding import GraphBound, RoundingBound
from trimserve_export.verify.sweep import Sweep, sweep

# Long enough for every position-dependent path, short enough that T x V logits stay small.
_MAX_TOKENS = 128


@dataclass(frozen=True)  # no slots: sessions open when the first check asks for them
class Context:
    """Everything a check may use.

    Attributes:
        folder: the trimmed folder under test.
        source: the model that it was made from.
        stored: the vocab tensors of the source's checkpoint; none where the source is a graph.
        full_folder: the full model, exported as the folder was; None for a trimmed checkpoint.
        texts: the texts to compare on.
    """

    folder: TrimmedFolder
    source: ModelSource
    stored: StoredVocab
    full_folder: Path | None
    texts: Sequence[str]

    @cached_property
    def codec(self) -> Codec:
        """The runtime's own way from text to token ids."""
        return Codec(self.folder)

    @cached_property
    def cold(self) -> ColdRows | None:
        """The folder's cold rows, if it has them."""
        return ColdRows(self.folder) if self.folder.has_cold else None

    @cached_property
    def trimmed(self) -> Model:
        """The folder's model."""
        return self._open(self.folder.path, self.folder.vocab, self.cold)

    @cached_property
    def full(self) -> Model:
        """The full model; each of its V ids has its own row."""
        if self.full_folder is None:
            raise UsageError(f"{self.folder.path} holds no graph: there is no full one to compare it with.")
        return self._open(self.full_folder, VocabMap.everything(self.folder.vocab.vocab_size), None)

    def _open(self, folder: Path, vocab: VocabMap, cold: ColdRows | None) -> Model:
        graphs = {
            role: GraphModel(open_session(folder / name), vocab, cold)
            for role, name in self.folder.manifest.graphs.items()
        }
        if "model" in graphs:
            return graphs["model"]
        (start_id,) = GenerationConfig(self.folder).decoder_start().tolist()
        return Seq2SeqModel(graphs["encoder"], graphs["decoder"], start_id)

    @cached_property
    def quantized_lookup(self) -> ir.Node | None:
        """The folder's embedding, if that is quantised."""
        graphs = self.folder.manifest.graphs
        if self.folder.manifest.quantization is None or "model" not in graphs:
            return None
        return quantized_lookup(ir.load(self.folder.file(graphs["model"])).graph)

    @property
    def quantized_roles(self) -> tuple[str, ...]:
        """The vocab tensors that are stored in blocks of integers."""
        manifest = self.folder.manifest
        if manifest.quantization is None:
            return ()
        head = ("head",) if has_vocab_head(manifest.task) else ()
        return head if self.quantized_lookup is None else (*head, "embedding")

    def encode(self, text: str) -> Ids | None:
        """Token ids of a text; None where the tokenizer gives an id that the model has no row for."""
        try:
            return self.codec.encode([text])[0]
        except UnknownIdError:
            return None

    @cached_property
    def token_ids(self) -> list[Ids]:
        """Token ids of the texts that the folder can be fed, cut to the model's length; never empty."""
        encoded = (self.encode(text) for text in self.texts)
        usable = (ids for ids in encoded if ids is not None and len(ids) and self.trimmed.can_feed(ids))
        return [ids[: self.max_tokens] for ids in usable]

    @cached_property
    def bound(self) -> RoundingBound:
        """How far two roundings of one vocab logit can lie apart."""
        if self.source.graph is not None and self.full_folder is not None:
            graphs = self.folder.manifest.graphs
            headed = self.full_folder / (graphs.get("decoder") or graphs["model"])
            return GraphBound(headed, self.folder.manifest.dtype)
        return RoundingBound(self.stored, self.folder.manifest.dtype)

    @cached_property
    def sweep(self) -> Sweep:
        """All outputs of both graphs on all texts, compared."""
        return sweep(self.full, self.trimmed, self.token_ids, self.bound)

    @property
    def max_tokens(self) -> int:
        """Tokens a text that every model takes."""
        lengths = self.folder.manifest.lengths
        if lengths is not None:
            return min(_MAX_TOKENS, lengths.longest or _MAX_TOKENS)
        config = self.source.config
        positions = next(
            (config[key] for key in ("max_position_embeddings", "n_positions") if key in config), _MAX_TOKENS
        )
        # RoBERTa's and MPNet's kind count positions from the pad id, or from 1.
        usable = positions - 2 - (config.get("pad_token_id") or 0)
        return min(_MAX_TOKENS, usable if usable > 0 else positions - 2)
