"""Encoder: texts to embeddings or head outputs, for a trimmed folder of an encoder model.

Cold tokens are fed from their own rows, so that outputs are the full model's on any text. A text's output
does not depend on the texts it shares a batch with, up to rounding: padding is masked, but another batch
shape can make the runtime add in another order.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats, Ids, Mask
from trimserve.encoder.answers import Candidate, full_logits, top_candidates
from trimserve.encoder.limits import longest_input
from trimserve.encoder.pooling import normalize_rows, pool
from trimserve.errors import UnsupportedModelError, UsageError
from trimserve.folder.manifest import Pooling
from trimserve.folder.opening import TrimmedFolder
from trimserve.runtime.cold_rows import COLD_INPUT, ColdRows, cold_widths
from trimserve.text.batching import Encoded, join
from trimserve.text.codec import Codec, shorten

if TYPE_CHECKING:
    import onnxruntime as ort
from trimserve.folder.tasks import EMBEDDING_TASK

_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids", "logits_to_keep"})
_ID_DTYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
# Padded tokens fed at a time on a CPU: activations grow with them (a MiniLM process took 400 MB for 32
# texts of 234 tokens, 150 MB for 1,024 tokens), and more of them only cost cache misses.
_CPU_BATCH_TOKENS = 1024


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


@dataclass(frozen=True, slots=True)
class _Output:
    """What the graph gave for one batch.

    Attributes:
        texts: int64 (B,), which of the caller's texts they are.
        ids: int64 (B, T), as they were fed.
        mask: int64 (B, T).
        values: float32 (B, T, D) or (B, D), by the head.
        hidden: the vocab head's input (B, T, H), or None.
    """

    texts: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    mask: Mask
    values: Floats
    hidden: Floats | None


class Encoder:
    """A trimmed encoder behind its original tokenizer.

    Example:
        >>> model = trimserve.load("minilm-tickets")  # doctest: +SKIP
        >>> model.encode(["Where is my card?"]).shape  # doctest: +SKIP
        (1, 384)

    Attributes:
        folder: the opened folder.
        codec: the original tokenizer.
        task: optimum's task name.
        max_tokens: longest input, special tokens included; None if the model has no limit.
        stats: see `EncoderStats`.
    """

    def __init__(
        self, folder: TrimmedFolder, session: "ort.InferenceSession", codec: Codec, cold: ColdRows
    ) -> None:
        self.folder = folder
        self.codec = codec
        self.task = folder.manifest.task
        self.max_tokens = longest_input(folder)
        self.stats = EncoderStats()
        self._session = session
        on_cpu = session.get_providers()[0] == "CPUExecutionProvider"
        self._batch_tokens = _CPU_BATCH_TOKENS if on_cpu else sys.maxsize
        self._cold = cold
        self._inputs = {value.name: value for value in session.get_inputs()}
        self._outputs = {value.name: value for value in session.get_outputs()}
        self._cold_inputs = tuple(cold_widths(session))
        self._result = "last_hidden_state" if self.task == EMBEDDING_TASK else "logits"
        self._check_graph()

    @property
    def dimension(self) -> int:
        """H, numbers of an embedding; columns of the head's output for other tasks."""
        size = self._outputs[self._result].shape[-1]
        return size if isinstance(size, int) else self._cold.width

    def encode(
        self, texts: str | Sequence[str], *, batch_size: int = 32, normalize: bool | None = None
    ) -> Floats:
        """Embed texts, pooled as the source model declares, else by the mean of its tokens.

        A text longer than `max_tokens` is cut and counted in `stats`; one without any token (possible
        where the tokenizer adds no special tokens) gets the zero vector.

        Args:
            texts: one text or any number of them.
            batch_size: texts fed at a time; texts of like length are fed together, and on a CPU fewer of
                long ones.
            normalize: scale embeddings to length 1; as the source model declares by default.

        Returns:
            float32 (n, H), in the order of `texts`.

        Raises:
            UsageError: the folder's task is not feature-extraction.
            UnknownIdError: a text holds a token that the folder has no row for.
        """
        if self.task != EMBEDDING_TASK:
            raise UsageError(f"{self.folder.path} does {self.task}, not embeddings: call forward().")
        texts = [texts] if isinstance(texts, str) else texts
        pooling = self.folder.manifest.pooling or Pooling()
        embeddings = np.zeros((len(texts), self.dimension), np.float32)
        for output in self._run(texts, batch_size):
            embeddings[output.texts] = pool(output.values, output.mask, pooling.mode)
        wanted = pooling.normalize if normalize is None else normalize
        return normalize_rows(embeddings) if wanted else embeddings

    def forward(self, texts: str | Sequence[str], *, batch_size: int = 32) -> list[Floats]:
        """Run the model's head.

        Args:
            texts: one text or any number of them; cut to `max_tokens`.
            batch_size: texts fed at a time.

        Returns:
            An array a text, without padding: hidden states (T, H) for feature-extraction; logits (T, K) of
            the kept ids for fill-mask (column i belongs to ``folder.vocab.kept_ids[i]``); (T, labels) for
            token-classification; (labels,) for text-classification. T counts the tokens fed.

        Raises:
            UsageError: a text without any token, where the head gives one result a text.
            UnknownIdError: a text holds a token that the folder has no row for.
        """
        texts = [texts] if isinstance(texts, str) else texts
        results: list[Floats | None] = [None] * len(texts)
        for output in self._run(texts, batch_size):
            lengths = output.mask.sum(axis=1)
            for text, values, length in zip(output.texts, output.values, lengths, strict=True):
                # A copy, so that no result keeps the whole batch alive.
                results[text] = values[:length].copy() if values.ndim == 2 else values
        pairs = zip(texts, results, strict=True)
        return [self._empty(text) if found is None else found for text, found in pairs]

    def fill_mask(
        self, texts: str | Sequence[str], *, top_k: int = 5, batch_size: int = 8
    ) -> list[list[list[Candidate]]]:
        """Predict the masked tokens of texts, over the full vocab where the folder has cold rows.

        Args:
            texts: texts with the tokenizer's mask token in them.
            top_k: candidates a mask.
            batch_size: texts fed at a time; each makes T x K logits.

        Returns:
            For each text, for each of its masks in order, the likeliest tokens first. Probabilities are
            those of the full model, or those among the kept ids in a folder without cold rows.

        Raises:
            UsageError: the folder's task is not fill-mask, or `top_k` is not positive.
        """
        if self.task != "fill-mask" or top_k < 1:
            raise UsageError(
                f"{self.folder.path} does {self.task} and top_k is {top_k}: filling masks takes a folder "
                "exported with --task fill-mask and at least one candidate."
            )
        texts = [texts] if isinstance(texts, str) else texts
        mask_id = int(self.codec.vocab.to_compact(self.codec.mask_id))
        results: list[list[list[Candidate]]] = [[] for _ in texts]
        for output in self._run(texts, batch_size):
            rows, columns = np.nonzero(output.ids == mask_id)
            hidden = None if output.hidden is None else output.hidden[rows, columns]
            logits, ids = full_logits(output.values[rows, columns], hidden, self.folder.vocab, self._cold)
            best = top_candidates(logits, ids, self.codec.tokenizer, top_k)
            for row, candidates in zip(rows, best, strict=True):
                results[output.texts[row]].append(candidates)
        return results

    def token_ids(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of texts as `forward` feeds them: cut to `max_tokens`, cold ones split if need be."""
        return [entry.ids for entry in self._encode(texts)[0]]

    def _run(self, texts: Sequence[str], batch_size: int) -> Iterator[_Output]:
        """Feed texts, longest first, in batches of like length; a text without tokens is left out."""
        if batch_size < 1:
            raise UsageError(f"batch_size should be 1 or more, found {batch_size}.")
        encoded, split = self._encode(texts)
        lengths = np.array([len(text.ids) for text in encoded], np.int64)
        self.stats.texts += len(texts)
        self.stats.tokens += int(lengths.sum())
        self.stats.cold_tokens += split
        self.stats.truncated += sum(text.truncated for text in encoded)
        order = np.argsort(-lengths, kind="stable")[: int(np.count_nonzero(lengths))]
        while order.size:
            # The longest text comes first and sets the width of its batch.
            fits = min(batch_size, max(1, self._batch_tokens // int(lengths[order[0]])))
            yield self._run_batch(order[:fits], encoded)
            order = order[fits:]

    def _run_batch(self, chosen: npt.NDArray[np.int64], encoded: Sequence[Encoded]) -> _Output:
        batch = self.codec.slots([encoded[text].ids for text in chosen])
        self.stats.cold_tokens += batch.cold_tokens
        feeds: dict[str, npt.NDArray[Any]] = {
            "input_ids": batch.ids,
            "attention_mask": batch.attention_mask,
            "logits_to_keep": np.array(0, np.int64),
        }
        feeds |= zip(self._cold_inputs, self._cold.embeddings(batch.cold_ids), strict=True)
        if "token_type_ids" in self._inputs:
            feeds["token_type_ids"], _ = join([encoded[text].type_ids for text in chosen]).padded(0)
        if "position_ids" in self._inputs:
            feeds["position_ids"] = np.tile(np.arange(batch.ids.shape[1]), (len(chosen), 1))
        values, hidden = self._call(feeds)
        return _Output(chosen, batch.ids, batch.attention_mask, values, hidden)

    def _call(self, feeds: dict[str, npt.NDArray[Any]]) -> tuple[Floats, Floats | None]:
        names = [name for name in (self._result, "hidden_states") if name in self._outputs]
        typed = {
            name: feeds[name].astype(_ID_DTYPES.get(value.type, feeds[name].dtype), copy=False)
            for name, value in self._inputs.items()
        }
        values, *hidden = (array.astype(np.float32, copy=False) for array in self._session.run(names, typed))
        return values, hidden[0] if hidden else None

    def _encode(self, texts: Sequence[str]) -> tuple[list[Encoded], int]:
        """Encode texts as they are fed, and count the cold tokens that were split for it."""
        encoded = self.codec.encode_typed(texts, max_tokens=self.max_tokens)
        if self.folder.has_cold:
            return encoded, 0
        cold_tokens = sum(int((~self.codec.vocab.is_kept(entry.ids)).sum()) for entry in encoded)
        return [self._split(entry) for entry in encoded], cold_tokens

    def _split(self, encoded: Encoded) -> Encoded:
        """Split cold tokens into kept pieces, and cut what has become too long."""
        servable = self.codec.servable([encoded.ids])
        (ids,), (repeats,) = servable.sequences, servable.repeats
        longer = Encoded(ids, np.repeat(encoded.type_ids, repeats), encoded.truncated)
        if self.max_tokens is None or len(ids) <= self.max_tokens:
            return longer
        # Tokens go from the end of the text, not the special ones behind it.
        ordinary = np.flatnonzero(~np.isin(ids, list(self.codec.special_ids)))
        tail = len(ids) - 1 - int(ordinary[-1])
        stay = np.r_[0 : self.max_tokens - tail, len(ids) - tail : len(ids)]
        return Encoded(ids[stay], longer.type_ids[stay], truncated=True)

    def _empty(self, text: str) -> Floats:
        """The output for a text without tokens."""
        if len(self._outputs[self._result].shape) == 2:
            raise UsageError(f"text {shorten(text)} has no tokens to classify: leave it out.")
        return np.zeros((0, self.dimension), np.float32)

    def _check_graph(self) -> None:
        unknown = sorted(self._inputs.keys() - _INPUTS - set(self._cold_inputs))
        missing = sorted({"input_ids", COLD_INPUT} - self._inputs.keys())
        missing += [] if self._result in self._outputs else [self._result]
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
