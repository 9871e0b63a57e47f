"""The graph side of an encoder: texts in, batches of what the graph says of them out.

Cold tokens are fed from their own rows, so that outputs are the full model's on any text. A text's output
does not depend on the texts it shares a batch with, up to rounding: padding is masked, but another batch
shape can make the runtime add in another order.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats, Mask
from trimserve.concurrency import Lock
from trimserve.encoder.limits import longest_input
from trimserve.errors import UnsupportedModelError, UsageError
from trimserve.folder.manifest import Lengths
from trimserve.folder.opening import TrimmedFolder
from trimserve.folder.sentence import SENTENCE, SentenceSettings
from trimserve.folder.tasks import ANSWERING_TASK, EMBEDDING_TASK
from trimserve.process import release_free_memory
from trimserve.runtime.cold_rows import COLD_INPUT, ColdRows, cold_widths
from trimserve.runtime.session import Session
from trimserve.text.batching import Encoded, join
from trimserve.text.codec import Codec, Text

# The two outputs of a head that answers questions: of an answer's first token, and of its last.
SPANS = ("start_logits", "end_logits")
_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids", "logits_to_keep"})
_ID_DTYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
# Padded tokens fed at a time on a CPU: activations grow with them (a MiniLM process took 400 MB for 32
# texts of 234 tokens, 150 MB for 1,024 tokens), and more of them only cost cache misses.
_CPU_BATCH_TOKENS = 1024
# The same where as little memory as possible is wanted. A call with more tokens than that ends with giving
# the C library's free memory back.
_LOW_BATCH_TOKENS = 256
# A batch with more pairs of tokens of one text is a long input: attention takes memory for each of them,
# which an arena keeps. What is fed at a time otherwise has fewer.
_LONG_INPUT_PAIRS = 1024 * 512


@dataclass(slots=True)
class EncoderStats:
    """What an encoder has done since it was loaded: the live coverage, which shows drift.

    Attributes:
        texts: texts encoded.
        tokens: tokens fed, special tokens included, padding not.
        cold_tokens: tokens without a compact row (in a folder without cold rows they were split).
        truncated: texts that were cut to the model's longest input.
    """

    texts: int = 0
    tokens: int = 0
    cold_tokens: int = 0
    truncated: int = 0
    _lock: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)

    def count(self, *, texts: int = 0, tokens: int = 0, cold_tokens: int = 0, truncated: int = 0) -> None:
        """Add what one call has done; calls may come from any thread."""
        with self._lock:
            self.texts += texts
            self.tokens += tokens
            self.cold_tokens += cold_tokens
            self.truncated += truncated


@dataclass(frozen=True, slots=True)
class GraphOutput:
    """What the graph gave for one batch.

    Attributes:
        texts: int64 (B,), which of the caller's texts they are.
        ids: int64 (B, T), as they were fed.
        mask: int64 (B, T).
        values: float32 (B, T, D) or (B, D), by the head; (B, T, 2) of a start and an end.
        hidden: the vocab head's input (B, T, H), or None.
    """

    texts: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    mask: Mask
    values: Floats
    hidden: Floats | None


class Batches(Protocol):
    """Makes batches of the texts of several callers."""

    def run(self, encoded: Sequence[Encoded], result: str) -> Iterator[GraphOutput]:
        """What the graph says of each text that has tokens, a text at a time, in any order."""
        ...


class EncoderGraph:
    """A trimmed encoder's graph behind its original tokenizer.

    Attributes:
        folder: the opened folder.
        codec: the original tokenizer.
        task: optimum's task name.
        max_tokens: longest input, special tokens included; None if the model has no limit.
        stats: see `EncoderStats`.
        cold: rows of the cold ids.
        result: the graph's output that `forward` gives.
        batches: makes the batches, where callers share them; None where each call makes its own.
    """

    def __init__(
        self,
        folder: TrimmedFolder,
        session: Session,
        codec: Codec,
        cold: ColdRows,
        settings: SentenceSettings,
    ) -> None:
        """Check that the graph is one of the folder's task.

        Raises:
            UnsupportedModelError: it is not.
        """
        self.folder = folder
        self.codec = codec
        self.task = folder.manifest.task
        self.batches: Batches | None = None
        self.max_tokens = longest_input(folder)
        self.stats = EncoderStats()
        self._unchanged = (folder.manifest.lengths or Lengths()).unchanged
        self._session = session
        self._settings = settings
        on_cpu = session.get_providers()[0] == "CPUExecutionProvider"
        self._gives_back = on_cpu and not session.plan.arena
        self._batch_tokens = _CPU_BATCH_TOKENS if on_cpu else sys.maxsize
        if self._gives_back:
            self._batch_tokens = _LOW_BATCH_TOKENS
        self.cold = cold
        self._inputs = {value.name: value for value in session.get_inputs()}
        self._outputs = {value.name: value for value in session.get_outputs()}
        self._cold_inputs = tuple(cold_widths(session))
        self.result = SPANS[0] if self.task == ANSWERING_TASK else "logits"
        if self.task == EMBEDDING_TASK:
            whole = SENTENCE in self._outputs and "last_hidden_state" not in self._outputs
            self.result = SENTENCE if whole else "last_hidden_state"
        self._check_graph()

    def width(self, name: str | None = None) -> int:
        """Columns of an output, by default the result: H, or those of the head's output."""
        size = self._outputs[name or self.result].shape[-1]
        return size if isinstance(size, int) else self.cold.width

    @property
    def gives_one_row(self) -> bool:
        """Whether the result has one row a text and not one a token."""
        return self.task != ANSWERING_TASK and len(self._outputs[self.result].shape) == 2

    def run(self, texts: Sequence[Text], batch_size: int, result: str | None = None) -> Iterator[GraphOutput]:
        """Feed texts, longest first, in batches of like length; a text without tokens is left out.

        Args:
            texts: texts or pairs of texts.
            batch_size: texts fed at a time, at most.
            result: the graph's output that is wanted; `result` by default.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size should be 1 or more, found {batch_size}.")
        encoded, split = self.encode(texts)
        yield from self.run_encoded(encoded, batch_size, result, split)

    def run_encoded(
        self, encoded: Sequence[Encoded], batch_size: int, result: str | None = None, split: int = 0
    ) -> Iterator[GraphOutput]:
        """Feed what `encode` gives; `split` cold tokens have been split for it."""
        lengths = np.array([len(text.ids) for text in encoded], np.int64)
        self.stats.count(
            texts=len(encoded),
            tokens=int(lengths.sum()),
            cold_tokens=split,
            truncated=sum(text.truncated for text in encoded),
        )
        if self.batches is not None:
            yield from self.batches.run(encoded, result or self.result)
            return
        order = np.argsort(-lengths, kind="stable")[: int(np.count_nonzero(lengths))]
        while order.size:
            fits = min(batch_size, self.together(lengths[order]))
            yield self.run_batch(order[:fits], encoded, result or self.result)
            order = order[fits:]
        if self._gives_back and lengths.sum() > self._batch_tokens:
            release_free_memory()
            self.codec.drop_pages()

    def together(self, lengths: npt.NDArray[np.int64]) -> int:
        """How many texts are one batch at most, of lengths (n,), the longest first; 1 or more."""
        # The longest text sets the width of its batch.
        longest = int(lengths[0])
        fits = max(1, self._batch_tokens // longest)
        # Nothing would tell padding from tokens; or positions depend on the length, and a graph has one for
        # the whole batch.
        unmasked = "attention_mask" not in self._inputs
        if unmasked or (self._unchanged is not None and longest > self._unchanged):
            fits = min(fits, int(np.count_nonzero(lengths == longest)))
        return min(fits, len(lengths))

    def run_batch(
        self, chosen: npt.NDArray[np.int64], encoded: Sequence[Encoded], result: str
    ) -> GraphOutput:
        """Feed some texts, int64 (B,), of those encoded as one batch, and give an output of the graph."""
        batch = self.codec.slots([encoded[text].ids for text in chosen])
        self.stats.count(cold_tokens=batch.cold_tokens)
        feeds: dict[str, npt.NDArray[Any]] = {
            "input_ids": batch.ids,
            "attention_mask": batch.attention_mask,
            "logits_to_keep": np.array(0, np.int64),
        }
        feeds |= zip(self._cold_inputs, self.cold.embeddings(batch.cold_ids), strict=True)
        if "token_type_ids" in self._inputs:
            types, _ = join([encoded[text].type_ids for text in chosen]).padded(0)
            feeds["token_type_ids"] = types if self._settings.type_ids else np.zeros_like(types)
        if "position_ids" in self._inputs:
            feeds["position_ids"] = np.tile(np.arange(batch.ids.shape[1]), (len(chosen), 1))
        values, hidden = self._call(feeds, result)
        return GraphOutput(chosen, batch.ids, batch.attention_mask, values, hidden)

    def _call(self, feeds: dict[str, npt.NDArray[Any]], result: str) -> tuple[Floats, Floats | None]:
        wanted = SPANS if result in SPANS else (result, "hidden_states")
        names = [name for name in wanted if name in self._outputs]
        typed = {
            name: feeds[name].astype(_ID_DTYPES.get(value.type, feeds[name].dtype), copy=False)
            for name, value in self._inputs.items()
        }
        rows, width = typed["input_ids"].shape
        made = self._session.run(names, typed, trims=rows * width * width > _LONG_INPUT_PAIRS)
        values, *hidden = (array.astype(np.float32, copy=False) for array in made)
        if result in SPANS:
            return np.stack([values, *hidden], axis=-1), None
        return values, hidden[0] if hidden else None

    def encode(self, texts: Sequence[Text]) -> tuple[list[Encoded], int]:
        """Encode texts as they are fed, and count the cold tokens that were split for it."""
        return self.codec.encode_fed(
            texts, add_special_tokens=self._settings.special_tokens, max_tokens=self.max_tokens
        )

    def _check_graph(self) -> None:
        if self._settings.graph_output == SENTENCE and SENTENCE not in self._outputs:
            raise UnsupportedModelError(
                f"the graph in {self.folder.path} has no output {SENTENCE}: export the model again."
            )
        unknown = sorted(self._inputs.keys() - _INPUTS - set(self._cold_inputs))
        missing = sorted({"input_ids", COLD_INPUT} - self._inputs.keys())
        results = SPANS if self.task == ANSWERING_TASK else (self.result,)
        missing += [name for name in results if name not in self._outputs]
        if unknown or missing:
            found = f"lacks {', '.join(missing)}" if missing else f"also wants {', '.join(unknown)}"
            raise UnsupportedModelError(
                f"the graph in {self.folder.path} {found}, so it is no {self.task} encoder made for serving: "
                "export the model again."
            )
        if self.folder.manifest.dtype == "bf16":
            raise UnsupportedModelError(
                f"{self.folder.path} is a bf16 encoder, which ONNX Runtime cannot be fed from numpy: export "
                "it with --dtype fp32 or fp16."
            )
