"""Answers in a context: what transformers' question-answering pipeline (version 4) makes of a head's numbers.

A context that is too long for one pass is read in overlapping windows; a window's answer is a pair of tokens,
the product of whose probabilities of being the start and the end is its score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypedDict

import numpy as np
import numpy.typing as npt
from msgspec import Meta
from tokenizers import Encoding, Tokenizer

from trimserve.arguments import Count
from trimserve.arrays import Floats
from trimserve.errors import UsageError
from trimserve.text.codec import shorten

_OUT = np.float32(-10000)  # the logit of what cannot be an answer, as in transformers
_LONGEST = 384  # tokens of a window, question included


class Answer(TypedDict):
    """An answer with the pipeline's keys: characters `start` to `end` of the context."""

    score: float
    start: int
    end: int
    answer: str


class AnswerArguments(TypedDict, total=False):
    """Keyword arguments of `Encoder.answer`; see `AnswerOptions`."""

    top_k: Count
    doc_stride: Annotated[int, Meta(ge=0)] | None
    max_answer_len: Count
    max_seq_len: Count | None
    handle_impossible_answer: bool
    align_to_words: bool


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How a question is answered.

    Attributes:
        top_k: answers at most.
        doc_stride: tokens that a window shares with the one before; 128 or half a window by default.
        max_answer_len: tokens of an answer at most.
        max_seq_len: tokens of a window, question included; 384 by default, or what the model reads.
        handle_impossible_answer: whether there may be no answer: an empty one with its score.
        align_to_words: whether an answer takes whole words.
    """

    top_k: int = 1
    doc_stride: int | None = None
    max_answer_len: int = 15
    max_seq_len: int | None = None
    handle_impossible_answer: bool = False
    align_to_words: bool = True

    def __post_init__(self) -> None:
        for name in ("top_k", "max_answer_len"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} should be 1 or more, found {getattr(self, name)}.")

    def windows(self, most: int | None) -> tuple[int, int]:
        """Tokens of a window, and those that it shares with the one before.

        Args:
            most: that the model reads.

        Raises:
            UsageError: the share is larger than a window, or a window than the model reads.
        """
        length = self.max_seq_len or min(most or _LONGEST, _LONGEST)
        stride = min(length // 2, 128) if self.doc_stride is None else self.doc_stride
        if stride > length or (most is not None and length > most):
            raise UsageError(
                f"doc_stride ({stride}) has to be at most max_seq_len ({length}), and that at most what the "
                f"model reads ({most})."
            )
        return length, stride


def encode_windows(
    tokenizer: Tokenizer,
    question: str,
    context: str,
    *,
    length: int,
    stride: int,
    question_first: bool = True,
    side: str = "right",
) -> list[Encoding]:
    """Encode a question with each window of its context.

    Raises:
        UsageError: the question leaves no room in a window.
    """
    strategy = "only_second" if question_first else "only_first"
    first, second = (question, context) if question_first else (context, question)
    asked, given = (len(tokenizer.encode(text, add_special_tokens=False)) for text in (question, context))
    room = length - asked - tokenizer.num_special_tokens_to_add(True)
    # The library panics where a window has nothing of its own.
    if given > room and room <= stride:
        raise UsageError(
            f"question {shorten(question)} leaves {room} of {length} tokens for its context, and windows "
            f"share {stride}: shorten it, lower doc_stride or raise max_seq_len."
        )
    tokenizer.enable_truncation(length, stride=stride, strategy=strategy, direction=side)
    encoding = tokenizer.encode(first, second)
    return [encoding, *encoding.overflowing]


def find_answers(
    context: str,
    windows: Sequence[tuple[Encoding, Floats]],
    options: AnswerOptions,
    *,
    cls_id: int | None,
    sequence: int = 1,
) -> list[Answer]:
    """The best answers, the likeliest first.

    Args:
        context: as it was given.
        windows: each one's tokens, and its logits of start and end, float32 (T, 2).
        options: see `AnswerOptions`.
        cls_id: the token that stands for "no answer".
        sequence: which of the pair's texts is the context.
    """
    answers: list[Answer] = []
    no_answer = 1e6
    most = options.top_k * 2 + 10 if options.align_to_words else options.top_k
    for encoding, logits in windows:
        allowed = np.array([number == sequence for number in encoding.sequence_ids])
        if cls_id is not None:
            allowed |= np.array(encoding.ids) == cls_id
        start, end = (_probabilities(logits[:, side], allowed) for side in (0, 1))
        no_answer = min(no_answer, float(start[0] * end[0]))
        start[0] = end[0] = 0
        for first, last, score in _best_pairs(start, end, allowed, most, options.max_answer_len):
            begin, finish = _characters(encoding, first, last, sequence, words=options.align_to_words)
            _add(answers, Answer(score=score, start=begin, end=finish, answer=context[begin:finish]))
    if options.handle_impossible_answer:
        answers.append(Answer(score=no_answer, start=0, end=0, answer=""))
    return sorted(answers, key=lambda answer: answer["score"], reverse=True)[: options.top_k]


def _probabilities(logits: Floats, allowed: npt.NDArray[np.bool_]) -> Floats:
    masked = np.where(allowed, logits, _OUT)
    weights = np.exp(masked - masked.max())
    shares: Floats = weights / weights.sum()
    return shares


def _best_pairs(
    start: Floats, end: Floats, allowed: npt.NDArray[np.bool_], most: int, longest: int
) -> list[tuple[int, int, float]]:
    """The likeliest (start, end, score), no longer than so many tokens."""
    scores = np.tril(np.triu(np.outer(start, end)), longest - 1).ravel()
    if most == 1:
        order = np.array([scores.argmax()])
    elif len(scores) < most:
        order = np.argsort(-scores)
    else:
        order = np.argpartition(-scores, most - 1)[:most]
        order = order[np.argsort(-scores[order])]
    starts, ends = np.divmod(order, len(start))
    usable = allowed[starts] & allowed[ends]
    found = (starts[usable], ends[usable], scores[order][usable])
    return list(zip(*(values.tolist() for values in found), strict=True))


def _characters(encoding: Encoding, first: int, last: int, sequence: int, *, words: bool) -> tuple[int, int]:
    """Where a span begins and ends in the context."""
    numbers = [encoding.token_to_word(place) for place in (first, last)] if words else []
    spans = [encoding.word_to_chars(word, sequence) for word in numbers if word is not None]
    found = [span for span in spans if span is not None]
    if len(found) == 2:
        return found[0][0], found[1][1]
    # Some tokenizers know no words.
    return encoding.offsets[first][0], encoding.offsets[last][1]


def _add(answers: list[Answer], new: Answer) -> None:
    """Add an answer, or its score to that of the same words."""
    for answer in answers:
        if answer["answer"].lower() == new["answer"].lower():
            answer["score"] += new["score"]
            return
    answers.append(new)
