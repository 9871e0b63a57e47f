"""What an encoder's head says of texts, as transformers' pipelines: labels, entities, answers, masks."""

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
from tokenizers import Encoding

from trimserve.arguments import Count, checked
from trimserve.arrays import Floats, Ids
from trimserve.encoder.answers import Candidate, fill_in, full_logits, top_candidates
from trimserve.encoder.classification import Function, Label, classify
from trimserve.encoder.graph import EncoderGraph
from trimserve.encoder.spans import Answer, AnswerArguments, AnswerOptions, encode_windows, find_answers
from trimserve.encoder.token_classes import Aggregation, Entity, tag
from trimserve.errors import UsageError
from trimserve.folder.opening import TrimmedFolder
from trimserve.folder.tasks import ANSWERING_TASK
from trimserve.text.codec import Codec, Text, as_encoded


class TaskMethods:
    """The methods of an `Encoder` that its folder's task decides about."""

    folder: TrimmedFolder
    codec: Codec
    task: str
    max_tokens: int | None
    _graph: EncoderGraph

    def forward(self, texts: Text | Sequence[Text], *, batch_size: Count = 32) -> list[Floats]:
        """Run the model's head; see `Encoder.forward`."""
        raise NotImplementedError

    @checked
    def classify(
        self,
        texts: Text | Sequence[Text],
        *,
        top_k: Count | None = None,
        function: Function | None = None,
        batch_size: Count = 32,
    ) -> list[list[Label]]:
        """Label texts, or pairs of texts, as transformers' text-classification pipeline does.

        Args:
            texts: one text or pair or any number of them; cut to `max_tokens`.
            top_k: labels to give of each, the likeliest first; all by default.
            function: sigmoid, softmax or none; as the pipeline chooses by config.json by default.
            batch_size: texts fed at a time.

        Raises:
            UsageError: the folder's task is another, or an option is out of range.
        """
        self._check_task("text-classification")
        config = self.folder.read_json("config.json")
        logits = self.forward(texts, batch_size=batch_size)
        return [classify(row, config, top_k=top_k, function=function) for row in logits]

    @checked
    def tag(
        self,
        texts: str | Sequence[str],
        *,
        aggregation: Aggregation = "none",
        ignore_labels: Sequence[str] = ("O",),
        batch_size: Count = 32,
    ) -> list[list[Entity]]:
        """Find entities in texts, as transformers' token-classification pipeline does.

        Args:
            texts: one text or any number of them; cut to `max_tokens`.
            aggregation: none (every token), simple, first, average or max; see `token_classes`.
            ignore_labels: labels that are left out.
            batch_size: texts fed at a time.

        Returns:
            For each text, entities with their label, score, word and the characters `start` to `end`.

        Raises:
            UsageError: the folder's task is another, or the strategy is unknown.
        """
        self._check_task("token-classification")
        texts = as_list(texts)
        with self.codec.lent() as tokenizer:
            if self.max_tokens is not None:
                tokenizer.enable_truncation(self.max_tokens, direction=self.codec.truncation_side)
            encodings = tokenizer.encode_batch(list(texts))
        config = self.folder.read_json("config.json")
        unk_id = self.codec.named_id("unk_token", getattr(tokenizer.model, "unk_token", None) or "<unk>")
        options: dict[str, Any] = {
            "aggregation": aggregation,
            "ignore_labels": ignore_labels,
            "unk_id": unk_id,
        }
        logits = self.forward(texts, batch_size=batch_size)
        return [
            tag(text, encoding, self._of_tokens(encoding, rows), tokenizer, config, **options)
            for text, encoding, rows in zip(texts, encodings, logits, strict=True)
        ]

    @checked
    def answer(
        self, question: str, context: str, *, batch_size: Count = 8, **options: Unpack[AnswerArguments]
    ) -> list[Answer]:
        """Find the answer to a question in a context, as transformers 4's question-answering pipeline does.

        Args:
            question: a question.
            context: the text with the answer, of any length: it is read in overlapping windows.
            batch_size: windows fed at a time.
            **options: see `AnswerOptions`.

        Returns:
            `top_k` answers at most, the likeliest first.

        Raises:
            UsageError: the folder's task is another, or an option is out of range.
        """
        self._check_task(ANSWERING_TASK)
        wanted = AnswerOptions(**options)
        length, stride = wanted.windows(self.max_tokens)
        first = self.folder.read_json("tokenizer_config.json").get("padding_side", "right") == "right"
        side = self.codec.truncation_side
        with self.codec.lent() as tokenizer:
            windows = encode_windows(
                tokenizer, question, context, length=length, stride=stride, question_first=first, side=side
            )
        encoded, split = self.codec.as_fed([as_encoded(window) for window in windows], self.max_tokens)
        logits: list[Floats] = [np.zeros((0, 2), np.float32)] * len(windows)
        for output in self._graph.run_encoded(encoded, batch_size, split=split):
            for place, rows in zip(output.texts, output.values, strict=True):
                logits[place] = self._of_tokens(windows[place], rows[: len(encoded[place].ids)])
        cls_id = self.codec.named_id("cls_token", "[CLS]", "<s>")
        pairs = list(zip(windows, logits, strict=True))
        return find_answers(context, pairs, wanted, cls_id=cls_id, sequence=1 if first else 0)

    @checked
    def fill_mask(
        self,
        texts: str | Sequence[str],
        *,
        top_k: Count = 5,
        targets: str | Sequence[str] | None = None,
        batch_size: Count = 8,
    ) -> list[list[list[Candidate]]]:
        """Predict the masked tokens of texts, over the full vocab where the folder has cold rows.

        Args:
            texts: texts with the tokenizer's mask token in them.
            top_k: candidates a mask.
            targets: the words to choose among, if not all; of one that is no token, its first token counts.
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
        texts = as_list(texts)
        mask_id = int(self.codec.vocab.to_compact(self.codec.mask_id))
        results: list[list[list[Candidate]]] = [[] for _ in texts]
        wanted = None if targets is None else self._target_ids(as_list(targets))
        encoded, split = self._graph.encode(texts)
        for output in self._graph.run_encoded(encoded, batch_size, split=split):
            rows, columns = np.nonzero(output.ids == mask_id)
            hidden = None if output.hidden is None else output.hidden[rows, columns]
            logits, ids = full_logits(
                output.values[rows, columns], hidden, self.folder.vocab, self._graph.cold
            )
            best = top_candidates(logits, ids, self.codec.token_text, top_k, wanted)
            masks = np.bincount(rows, minlength=len(output.texts))
            for row, place, candidates in zip(rows, columns, best, strict=True):
                text, only = output.texts[row], bool(masks[row] == 1)
                filled = [
                    fill_in(found, encoded[text].ids, int(place), self.codec, only_mask=only)
                    for found in candidates
                ]
                results[text].append(filled)
        return results

    def _check_task(self, task: str) -> None:
        if self.task != task:
            raise UsageError(f"{self.folder.path} does {self.task}: this takes a folder for {task}.")

    def _of_tokens(self, encoding: Encoding, rows: Floats) -> Floats:
        """The rows of a text's own tokens, float32 (T, D), where cold ones may have been split."""
        if len(rows) == len(encoding.ids):
            return rows
        (repeats,) = self.codec.servable([np.array(encoding.ids, np.int32)]).repeats
        firsts: Floats = rows[np.minimum(np.cumsum(repeats) - repeats, len(rows) - 1)]
        return firsts

    def _target_ids(self, targets: Sequence[str]) -> Ids:
        """The token of each word, or its first one, int32.

        Raises:
            UsageError: a word has no token.
        """
        found = [self.codec.tokenizer.token_to_id(target) for target in targets]
        for place, (target, token_id) in enumerate(zip(targets, found, strict=True)):
            if token_id is None:
                (ids,) = self.codec.encode([target], add_special_tokens=False)
                if not ids.size:
                    raise UsageError(f"target {target!r} has no token: leave it out.")
                found[place] = int(ids[0])
        return np.unique(np.array(found, np.int32))


def as_list(texts: str | Sequence[str]) -> Sequence[str]:
    """One text, or several, as several."""
    return [texts] if isinstance(texts, str) else texts
