"""Encoder: texts to embeddings, scores or head outputs, for a trimmed folder of an encoder model."""

import copy
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

from trimserve.arguments import Count, checked
from trimserve.arrays import Floats, Ids
from trimserve.console import progress
from trimserve.encoder.cross_encoder import Pair, RankedDocument, ranked, scored_pairs, to_scores
from trimserve.encoder.graph import Batches, EncoderGraph, GraphOutput
from trimserve.encoder.modules import SentenceModules
from trimserve.encoder.pooling import normalize_rows
from trimserve.encoder.similarity import similarity, similarity_pairwise
from trimserve.encoder.sparse import SparseVector, keep_largest, sparse_vectors, splade
from trimserve.encoder.task_methods import TaskMethods, as_list
from trimserve.errors import UsageError
from trimserve.folder.opening import TrimmedFolder
from trimserve.folder.sentence import SENTENCE, TOKENS, SpladePooling, read_settings
from trimserve.folder.tasks import EMBEDDING_TASK
from trimserve.runtime.cold_rows import ColdRows
from trimserve.runtime.session import Session
from trimserve.text.batching import Encoded
from trimserve.text.codec import Codec, Text, shorten

# The prompts that sentence-transformers takes for queries and documents where none is asked for.
_QUERY_PROMPTS = ("query",)
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


class Encoder(TaskMethods):
    """A trimmed encoder behind its original tokenizer.

    Example:
        >>> model = trimserve.load("minilm-tickets")  # doctest: +SKIP
        >>> model.encode(["Where is my card?"]).shape  # doctest: +SKIP
        (1, 384)

    Attributes:
        folder: the opened folder.
        codec: the original tokenizer.
        task: optimum's task name.
        settings: prompts, modules and what else sentence-transformers does around the graph.
        max_tokens: longest input, special tokens included; None if the model has no limit.
        stats: see `EncoderStats`.
    """

    def __init__(self, folder: TrimmedFolder, session: Session, codec: Codec, cold: ColdRows) -> None:
        self.folder = folder
        self.codec = codec
        self.task = folder.manifest.task
        self.settings = read_settings(folder)
        self._modules = SentenceModules.of_folder(folder, self.settings)
        self._graph = EncoderGraph(folder, session, codec, cold, self.settings)
        self.max_tokens = self._graph.max_tokens
        self.stats = self._graph.stats

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.folder}>"

    @property
    def dimension(self) -> int:
        """Numbers of an embedding, or of a row of the head's output for other tasks."""
        if self.settings.is_sparse:
            return self.codec.vocab.vocab_size
        if self.task != EMBEDDING_TASK:
            return self._graph.width()
        return int(self._embed_nothing(normalize=False).shape[1])

    @property
    def graph(self) -> EncoderGraph:
        """The graph that its texts are fed to."""
        return self._graph

    def sharing(self, batches: Batches) -> Self:
        """The same model, whose texts are fed in batches with those of other callers."""
        mine = copy.copy(self)
        mine._graph = copy.copy(self._graph)
        mine._graph.batches = batches
        return mine

    @checked
    def encode(
        self,
        texts: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate_dim: Count | None = None,
        batch_size: Count = 32,
        normalize: bool | None = None,
        show_progress_bar: bool = False,
    ) -> Floats:
        """Embed texts as sentence-transformers does with the source model: `SentenceTransformer.encode`.

        A folder that it was not made for pools by the mean of a text's tokens. A text longer than
        `max_tokens` is cut and counted in `stats`. A sparse encoder gives one weight for each token id; see
        `encode_sparse` for those that are not 0 alone.

        Args:
            texts: one text or any number of them.
            prompt_name: one of ``settings.prompts``, put before each text; the folder's default prompt where
                neither this nor `prompt` is given.
            prompt: the prompt itself; an empty one for none.
            truncate_dim: numbers of an embedding that stay, counted from the first; the folder's by default.
            batch_size: texts fed at a time; texts of like length are fed together, and on a CPU fewer of
                long ones.
            normalize: scale embeddings to length 1 (after they are truncated); False leaves out the
                normalisation that the source model ends with.
            show_progress_bar: show on stderr, where that is a terminal, how many texts are done.

        Returns:
            float32 (n, D), in the order of `texts`; (1, D) for one text.

        Raises:
            UsageError: the folder gives no embeddings, there is no such prompt, or `truncate_dim` is not
                positive.
            UnknownIdError: a text holds a token that the folder has no row for.
        """
        if not (self.task == EMBEDDING_TASK or self.settings.is_sparse):
            raise UsageError(f"{self.folder.path} does {self.task}, not embeddings: call forward().")
        before = self.settings.prompt(prompt_name, prompt)
        texts = [before + text for text in as_list(texts)]
        columns = _columns(self.settings.truncate_dim if truncate_dim is None else truncate_dim)
        with progress(len(texts), "encoding", "text", show=show_progress_bar) as bar:
            if self.settings.is_sparse:
                embeddings = self._weights(texts, batch_size, bar.update)[:, :columns]
            else:
                dropped = self._prompt_tokens(before) if before and self.settings.drops_prompt else 0
                embeddings = self._embed(
                    *self._graph.encode(texts),
                    dropped,
                    batch_size,
                    columns,
                    normalize=normalize is not False,
                    done=bar.update,
                )
        return normalize_rows(embeddings) if normalize else embeddings

    @checked
    def encode_ids(
        self,
        sequences: Sequence[npt.ArrayLike],
        *,
        truncate_dim: Count | None = None,
        batch_size: Count = 32,
    ) -> Floats:
        """Embed token ids as they are: no prompt, no special tokens are added.

        Args:
            sequences: token ids (T,) each, at most `max_tokens` of them.
            truncate_dim: see `encode`.
            batch_size: see `encode`.

        Returns:
            float32 (n, D), in the order of `sequences`.

        Raises:
            UsageError: the folder gives no embeddings, or a sequence is too long.
            UnknownIdError: an id that the folder has no row for.
        """
        if self.task != EMBEDDING_TASK or self.settings.is_sparse:
            raise UsageError(f"{self.folder.path} does {self.task}, not embeddings of token ids.")
        columns = _columns(self.settings.truncate_dim if truncate_dim is None else truncate_dim)
        given = [np.asarray(ids, np.int32) for ids in sequences]
        longest = max((ids.size for ids in given), default=0)
        if self.max_tokens is not None and longest > self.max_tokens:
            raise UsageError(
                f"found {longest:,} token ids in a row, this model reads {self.max_tokens:,} at most: "
                "shorten them."
            )
        encoded = [Encoded(ids, np.zeros(ids.size, np.int32)) for ids in given]
        encoded, split = self.codec.as_fed(encoded, self.max_tokens)
        return self._embed(encoded, split, 0, batch_size, columns, normalize=True)

    @checked
    def encode_query(self, texts: str | Sequence[str], *, batch_size: Count = 32) -> Floats:
        """Embed queries: `encode` with the prompt ``"query"`` where the folder has one."""
        return self.encode(texts, prompt_name=self._first_prompt(_QUERY_PROMPTS), batch_size=batch_size)

    @checked
    def encode_document(self, texts: str | Sequence[str], *, batch_size: Count = 32) -> Floats:
        """Embed documents: `encode` with the prompt ``"document"``, ``"passage"`` or ``"corpus"``."""
        return self.encode(texts, prompt_name=self._first_prompt(_DOCUMENT_PROMPTS), batch_size=batch_size)

    @checked
    def encode_sparse(
        self,
        texts: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: Count = 32,
    ) -> list[SparseVector]:
        """Embed texts as sparse vectors: `SparseEncoder.encode`, without the zeros.

        Args:
            texts: see `encode`.
            prompt_name: see `encode`.
            prompt: see `encode`.
            batch_size: see `encode`.

        Returns:
            Token ids and weights of each text.

        Raises:
            UsageError: the folder is no sparse encoder, or there is no such prompt.
        """
        if not self.settings.is_sparse:
            raise UsageError(f"{self.folder.path} is no sparse encoder: call encode().")
        before = self.settings.prompt(prompt_name, prompt)
        return sparse_vectors(self._weights([before + text for text in as_list(texts)], batch_size))

    @checked
    def similarity(self, first: npt.ArrayLike, second: npt.ArrayLike) -> Floats:
        """Compare embeddings (n, D) with embeddings (m, D) by the folder's function; float32 (n, m)."""
        return similarity(self.settings.similarity, first, second)

    @checked
    def similarity_pairwise(self, first: npt.ArrayLike, second: npt.ArrayLike) -> Floats:
        """Compare embeddings (n, D) one by one with embeddings (n, D); float32 (n,)."""
        return similarity_pairwise(self.settings.similarity, first, second)

    @checked
    def predict(
        self,
        pairs: Pair | Sequence[Pair],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: Count = 32,
        apply_softmax: bool = False,
    ) -> Floats:
        """Score pairs of texts that are read together: `CrossEncoder.predict`.

        Args:
            pairs: one pair or any number of them, e.g. of a query and a document. A pair longer than
                `max_tokens` loses tokens of its longer text.
            prompt_name: one of ``settings.prompts``, put before the first text of each pair.
            prompt: the prompt itself.
            batch_size: pairs fed at a time.
            apply_softmax: turn the scores of several labels into probabilities.

        Returns:
            float32 (n,) where the model has one label, else (n, labels); () or (labels,) for one pair.

        Raises:
            UsageError: the folder gives no scores, or there is no such prompt.
        """
        self._check_scores()
        inputs, single = scored_pairs(pairs, self.settings.prompt(prompt_name, prompt))
        scores: list[Floats] = [np.zeros(0, np.float32)] * len(inputs)
        for output in self._graph.run(inputs, batch_size):
            made = self._modules.run(output.values, output.mask, result="scores")
            for text, row in zip(output.texts, made, strict=True):
                scores[text] = row
        width = len(scores[0]) if scores else 1
        table = np.array(scores, np.float32).reshape(len(inputs), width)
        found = to_scores(table, self.settings.activation, apply_softmax=apply_softmax)
        return np.asarray(found[0], np.float32) if single else found

    @checked
    def rank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: Count | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: Count = 32,
    ) -> list[RankedDocument]:
        """Sort documents by their score with a query, the best first: `CrossEncoder.rank`.

        Args:
            query: the first text of each pair.
            documents: the second ones.
            top_k: how many to give; all by default.
            return_documents: give the texts as well.
            prompt_name: see `predict`.
            prompt: see `predict`.
            batch_size: see `predict`.

        Returns:
            For each document its place in `documents` as `corpus_id`, and its `score`.

        Raises:
            UsageError: see `predict`; or the model has several labels.
        """
        pairs = [(query, document) for document in documents]
        scores = self.predict(pairs, prompt_name=prompt_name, prompt=prompt, batch_size=batch_size)
        if scores.ndim > 1:
            raise UsageError(f"{self.folder.path} scores {scores.shape[1]} labels: call predict() instead.")
        return ranked(scores, documents if return_documents else None)[:top_k]

    @checked
    def forward(self, texts: Text | Sequence[Text], *, batch_size: Count = 32) -> list[Floats]:
        """Run the model's head.

        Args:
            texts: one text or any number of them, or of pairs of texts; cut to `max_tokens`.
            batch_size: texts fed at a time.

        Returns:
            An array a text, without padding: hidden states (T, H) for feature-extraction; logits (T, K) of
            the kept ids for fill-mask (column i belongs to ``folder.vocab.kept_ids[i]``); (T, labels) for
            token-classification; (labels,) for text-classification. T counts the tokens fed.

        Raises:
            UsageError: a text without any token, where the head gives one result a text.
            UnknownIdError: a text holds a token that the folder has no row for.
        """
        texts = [texts] if isinstance(texts, str | tuple) else texts
        results: list[Floats | None] = [None] * len(texts)
        for output in self._graph.run(texts, batch_size):
            lengths = output.mask.sum(axis=1)
            for text, values, length in zip(output.texts, output.values, lengths, strict=True):
                # A copy, so that no result keeps the whole batch alive.
                results[text] = values[:length].copy() if values.ndim == 2 else values
        pairs = zip(texts, results, strict=True)
        return [self._empty(text) if found is None else found for text, found in pairs]

    @checked
    def token_ids(self, texts: Sequence[Text]) -> list[Ids]:
        """Token ids of texts as `forward` feeds them: cut to `max_tokens`, cold ones split if need be."""
        return [entry.ids for entry in self._graph.encode(texts)[0]]

    def _embed(
        self,
        encoded: Sequence[Encoded],
        split: int,
        dropped: int,
        batch_size: int,
        columns: int | None,
        *,
        normalize: bool,
        done: Callable[[int], object] = int,
    ) -> Floats:
        """Embeddings (n, D) of what the tokenizer gave; the first `dropped` tokens of each do not count."""
        # Whatever has no token keeps this row.
        start = self._embed_nothing(normalize=normalize)[:, :columns]
        embeddings = np.repeat(start, len(encoded), axis=0)
        whole = SENTENCE if self.settings.graph_output == SENTENCE else None
        for output in self._graph.run_encoded(encoded, batch_size, whole, split):
            made = self._modules.run(output.values, output.mask, dropped=dropped, normalize=normalize)
            embeddings[output.texts] = made[:, :columns]
            done(len(output.texts))
        return embeddings

    def _embed_nothing(self, *, normalize: bool) -> Floats:
        """The embedding (1, D) of a text without tokens, whose token vectors add up to nothing."""
        tokens = self.settings.graph_output == TOKENS
        width = self._graph.width(None if tokens else SENTENCE)
        values = np.zeros((1, 1, width) if tokens else (1, width), np.float32)
        return self._modules.run(values, np.ones((1, 1), np.int64), normalize=normalize)

    def _prompt_tokens(self, prompt: str) -> int:
        """Tokens at the start of a text that are its prompt's.

        A last one does not count that transformers' `all_special_ids` hold: sentence-transformers' rule.
        """
        (ids,) = self.token_ids([prompt])
        return len(ids) - int(len(ids) > 0 and int(ids[-1]) in self.settings.prompt_ends)

    def _weights(self, texts: list[str], batch_size: int, done: Callable[[int], object] = int) -> Floats:
        """Weights (n, V) of a sparse encoder."""
        (module,) = (found for found in self.settings.modules if isinstance(found, SpladePooling))
        weights = np.zeros((len(texts), self.dimension), np.float32)
        for output in self._graph.run(texts, batch_size):
            weights[output.texts] = self._splade(module, output)
            done(len(output.texts))
        return keep_largest(weights, self.settings.max_active_dims)

    def _splade(self, module: SpladePooling, output: GraphOutput) -> Floats:
        vocab, cold = self.folder.vocab, self._graph.cold
        pooled = splade(module, output.values, output.mask, output.hidden, vocab, cold)
        return self._modules.run(pooled, output.mask)

    def _first_prompt(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if name in self.settings.prompts), None)

    def _check_scores(self) -> None:
        if self.settings.kind != "CrossEncoder":
            raise UsageError(
                f"{self.folder.path} does {self.task}, which scores no pairs: export a cross encoder, "
                "a model for text-classification."
            )
        if self.settings.no_pairs is not None:
            raise UsageError(f"{self.folder.path} cannot score pairs: {self.settings.no_pairs}.")

    def _empty(self, text: Text) -> Floats:
        """The output for a text without tokens."""
        if self._graph.gives_one_row:
            raise UsageError(f"text {shorten(text)} has no tokens to classify: leave it out.")
        return np.zeros((0, self._graph.width()), np.float32)


def _columns(truncate_dim: int | None) -> int | None:
    if truncate_dim is not None and truncate_dim < 1:
        raise UsageError(f"truncate_dim should be 1 or more, found {truncate_dim}.")
    return truncate_dim
