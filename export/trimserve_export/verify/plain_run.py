"""Run a full or a trimmed graph the plain way: one text, no batch, no cache of its own, feeds by input name.

The reference of every numeric check. It shares no code with the runtime that it is to check.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Ids
from trimserve.runtime.cold_rows import ColdRows
from trimserve.vocab.map import VocabMap

if TYPE_CHECKING:
    import onnxruntime as ort

Array = npt.NDArray[Any]
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


@dataclass(frozen=True, slots=True)
class GraphModel:
    """A graph, the vocab that its ids belong to, and where rows of cold ids come from.

    Attributes:
        session: the graph.
        vocab: kept ids of the graph; all ids for a full model.
        cold: None where the folder has no cold rows.
    """

    session: "ort.InferenceSession"
    vocab: VocabMap
    cold: ColdRows | None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs."""
        return tuple(value.name for value in self.session.get_outputs())

    @property
    def has_vocab_head(self) -> bool:
        """Whether `logits` has the vocab as its last axis."""
        return "hidden_states" in self.outputs

    def can_feed(self, ids: Ids) -> bool:
        """Whether every id has a compact row or a cold row."""
        return self.cold is not None or bool(self.vocab.is_kept(ids).all())

    def run(self, ids: Ids, past: Mapping[str, Array] | None = None, *, keep: int = 0) -> dict[str, Array]:
        """Feed token ids to the graph.

        Args:
            ids: token ids (T,) of the original vocab.
            past: `present.*` outputs of an earlier call, for graphs with a KV cache.
            keep: positions to give logits for, counted from the end; 0 for all.

        Returns:
            The outputs by name, batch size 1.
        """
        slotted = self.vocab.with_slots(ids)
        feeds = self._past(past or {})
        before = _cached_positions(feeds, of_source=False)
        feeds["input_ids"] = slotted.ids[None]
        feeds["attention_mask"] = np.ones((1, before + len(ids)), np.int64)
        feeds["token_type_ids"] = np.zeros((1, len(ids)), np.int64)
        feeds["position_ids"] = np.arange(before, before + len(ids), dtype=np.int64)[None]
        feeds["encoder_attention_mask"] = np.ones((1, _cached_positions(feeds, of_source=True)), np.int64)
        feeds["logits_to_keep"] = np.array(keep, np.int64)
        wanted = {value.name for value in self.session.get_inputs()}
        feeds |= self._cold_rows(slotted.cold_ids)
        values = self.session.run(None, {name: feeds[name] for name in wanted})
        return dict(zip(self.outputs, values, strict=True))

    def _past(self, past: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {}
        for value in self.session.get_inputs():
            if value.name.startswith("past_key_values."):
                is_state = value.name.endswith((".conv", ".recurrent"))
                sizes = [1, *value.shape[1:]] if is_state else [1, value.shape[1], 0, value.shape[3]]
                empty = np.zeros(sizes, _DTYPES[value.type])
                feeds[value.name] = past.get(value.name.replace("past_key_values.", "present."), empty)
        return feeds

    def _cold_rows(self, cold_ids: Ids) -> dict[str, Array]:
        inputs = [value for value in self.session.get_inputs() if value.name.startswith("cold_rows")]
        if self.cold is not None and len(cold_ids):
            rows = self.cold.embeddings(cold_ids)
            return {value.name: of_table for value, of_table in zip(inputs, rows, strict=True)}
        # The inputs must not be empty; no id points at these rows.
        return {value.name: np.zeros((1, value.shape[1]), _DTYPES[value.type]) for value in inputs}


def _cached_positions(past: Mapping[str, Array], *, of_source: bool) -> int:
    """Positions in the cache: of the source text for cross-attention, else of the tokens so far."""
    keys = ((name, value) for name, value in past.items() if name.endswith(".key"))
    shapes = (value.shape for name, value in keys if (".encoder." in name) == of_source)
    return next((shape[2] for shape in shapes), 0)


@dataclass(frozen=True, slots=True)
class Seq2SeqModel:
    """An encoder and a decoder with cross-attention, run one after the other.

    Attributes:
        encoder: makes `present.N.encoder.*`, the cross-attention's keys and values.
        decoder: has the vocab head.
        start_id: token id that a decoder's text begins with.
    """

    encoder: GraphModel
    decoder: GraphModel
    start_id: int

    @property
    def vocab(self) -> VocabMap:
        """Kept ids of both graphs."""
        return self.decoder.vocab

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of all outputs; those of the encoder begin with ``encoder.``."""
        return (*(f"encoder.{name}" for name in self.encoder.outputs), *self.decoder.outputs)

    @property
    def has_vocab_head(self) -> bool:
        """Whether `logits` has the vocab as its last axis."""
        return self.decoder.has_vocab_head

    def can_feed(self, ids: Ids) -> bool:
        """Whether every id has a compact row or a cold row."""
        return self.decoder.can_feed(ids)

    def run(self, ids: Ids) -> dict[str, Array]:
        """Encode token ids, and decode the same ids after the start id."""
        encoded = self.encoder.run(ids)
        shifted = np.concatenate([np.array([self.start_id], np.int32), ids[:-1]])
        decoded = self.decoder.run(shifted, encoded)
        return {f"encoder.{name}": value for name, value in encoded.items()} | decoded


Model: TypeAlias = GraphModel | Seq2SeqModel
