"""Run a full or a trimmed graph the plain way: one text, no batch, no cache of its own, feeds by input name.

The reference of every numeric check. It shares no code with the runtime that it is to check.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trimserve.cold import ColdRows
from trimserve.vocab import Ids, VocabMap

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
        before = next((value.shape[2] for value in feeds.values()), 0)
        feeds["input_ids"] = slotted.ids[None]
        feeds["attention_mask"] = np.ones((1, before + len(ids)), np.int64)
        feeds["token_type_ids"] = np.zeros((1, len(ids)), np.int64)
        feeds["position_ids"] = np.arange(before, before + len(ids), dtype=np.int64)[None]
        feeds["logits_to_keep"] = np.array(keep, np.int64)
        feeds["cold_rows"] = self._cold_rows(slotted.cold_ids)
        wanted = {value.name for value in self.session.get_inputs()}
        values = self.session.run(None, {name: feeds[name] for name in wanted})
        return dict(zip(self.outputs, values, strict=True))

    def _past(self, past: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {}
        for value in self.session.get_inputs():
            if value.name.startswith("past_key_values."):
                _, heads, _, width = value.shape
                empty = np.zeros((1, heads, 0, width), _DTYPES[value.type])
                feeds[value.name] = past.get(value.name.replace("past_key_values.", "present."), empty)
        return feeds

    def _cold_rows(self, cold_ids: Ids) -> Array:
        if self.cold is not None and len(cold_ids):
            return self.cold.embedding(cold_ids)
        # The input must not be empty; no id points at this row.
        described = next(value for value in self.session.get_inputs() if value.name == "cold_rows")
        return np.zeros((1, described.shape[1]), _DTYPES[described.type])
