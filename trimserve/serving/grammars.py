"""Answers that follow a grammar: JSON schemas, regular expressions, choices, Lark grammars.

A grammar is a mask over token ids of the full vocab, applied by the sampler where any other logits processor
stands. So what comes out is exactly what the full model gives under the same mask, cold ids included.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats, Ids
from trimserve.errors import UsageError, require
from trimserve.foreign import foreign
from trimserve.generation.generator import Generator
from trimserve.serving.fields import Sampling
from trimserve.serving.problems import bad_field

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_OF_STRUCTURED = ("json", "regex", "choice", "grammar", "json_object")


class Grammars:
    """Makes the masks of one model; the first grammar prepares its tokenizer, for a second or two."""

    def __init__(self, model: Generator) -> None:
        self._model = model

    def mask(self, grammar: str, param: str) -> "GrammarMask":
        """The mask of one answer.

        Args:
            grammar: as the functions below give it.
            param: the field that it came in, for messages.

        Raises:
            ApiError: 400, it is no grammar, or too large.
            MissingExtraError: the extra ``grammar`` is not installed.
        """
        guidance = require("llguidance", extra="grammar", purpose=param)
        matcher: LLMatcher = guidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:300].rstrip(".")
            raise bad_field(param, f"{param} cannot be followed ({reason}): mend it.", "invalid_grammar")
        return GrammarMask(matcher, self._model.folder.vocab.vocab_size, self._ends)

    @cached_property
    def _ends(self) -> Ids:
        return np.array(sorted(self._model.stop_ids), np.int32)

    @cached_property
    def _tokenizer(self) -> "LLTokenizer":
        guidance = require("llguidance", extra="grammar", purpose="a grammar")
        folder = self._model.folder
        if not self._ends.size:
            raise UsageError(f"{folder.path} has no eos token, with which an answer by a grammar could end.")
        advice = "ask for an answer without a grammar."
        with foreign(f"no grammar fits the tokenizer of {folder.path}", advice=advice, error=UsageError):
            made: LLTokenizer = guidance.LLTokenizer(
                self._model.codec.tokenizer.to_str(),
                n_vocab=folder.vocab.vocab_size,
                eos_token=self._ends.tolist(),
            )
        return made


class GrammarMask:
    """The logits processor of one answer: -inf for every id that the grammar does not allow.

    Pure as to what it gives: it keeps the matcher's state for the ids that it saw last, and goes back to
    where others branch off, as drafts do that did not stand.
    """

    def __init__(self, matcher: "LLMatcher", vocab_size: int, ends: Ids) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._prompt_tokens: int | None = None
        self._ends = ends
        self._seen: list[int] = []

    def __call__(self, ids: Ids, logits: Floats) -> Floats:
        """Mask logits, float32 (V,), after prompt and output `ids`; the first call is before any output."""
        if self._prompt_tokens is None:
            self._prompt_tokens = ids.size
        masked: Floats = np.where(self.allowed(ids[self._prompt_tokens :]), logits, np.float32(-np.inf))
        return masked

    def allowed(self, output: Ids) -> npt.NDArray[np.bool_]:
        """Which ids may follow an output, bool (V,)."""
        if not self._advance(output.tolist()):
            return self._only_ends()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        found: npt.NDArray[np.bool_] = np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(
            bool
        )
        return found if found.any() else self._only_ends()

    def _advance(self, output: list[int]) -> bool:
        """Bring the matcher behind an output; whether the grammar allows it and can go on from it."""
        pairs = zip(self._seen, output, strict=False)
        common = next(
            (at for at, (seen, new) in enumerate(pairs) if seen != new), min(len(self._seen), len(output))
        )
        if common < len(self._seen):
            self._matcher.rollback(len(self._seen) - common)
            del self._seen[common:]
        rest = output[common:]
        taken = self._matcher.try_consume_tokens(rest) if rest else 0
        self._seen += rest[:taken]
        # A draft that only filled a step, or what comes after the end: the check takes neither.
        return taken == len(rest) and not self._matcher.is_stopped()

    def _only_ends(self) -> npt.NDArray[np.bool_]:
        found = np.zeros(self._vocab_size, bool)
        found[self._ends] = True
        return found


def asked_grammar(fields: Sampling) -> tuple[str, str] | None:
    """The grammar of a request and the field that it came in; None without one.

    Raises:
        ApiError: 400, two of them, or one that is not what it should be.
        MissingExtraError: the extra ``grammar`` is not installed.
    """
    format_ = fields.response_format or {}
    kind = format_.get("type", "text")
    if kind == "text" and fields.structured_outputs is None:
        return None
    if kind != "text" and fields.structured_outputs is not None:
        raise bad_field(
            "structured_outputs", "response_format and structured_outputs say the same: give one of them."
        )
    if kind == "text":
        return _of_structured(fields.structured_outputs or {}), "structured_outputs"
    if kind == "json_object":
        return json_grammar({"type": "object"}, "response_format"), "response_format"
    schema = format_.get("json_schema")
    if kind != "json_schema" or not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
        raise bad_field(
            "response_format",
            "response_format should be of type text, json_object, or json_schema with a json_schema.schema: "
            "mend it.",
        )
    return json_grammar(schema["schema"], "response_format"), "response_format"


def _of_structured(asked: Mapping[str, Any]) -> str:
    """The shape of vLLM: one of json, regex, choice, grammar."""
    match {name: value for name, value in asked.items() if value is not None}:
        case {"json": dict(schema), **rest} if not rest:
            return json_grammar(schema, "structured_outputs")
        case {"json_object": True, **rest} if not rest:
            return json_grammar({"type": "object"}, "structured_outputs")
        case {"regex": str(regex), **rest} if not rest:
            return _made("grammar_from_regex", regex)
        case {"choice": [_, *_] as choices, **rest} if not rest and all(
            isinstance(one, str) for one in choices
        ):
            return choice_grammar(choices)
        case {"grammar": str(lark), **rest} if not rest:
            return lark_grammar(lark)
    raise bad_field(
        "structured_outputs",
        f"structured_outputs should have one of {', '.join(_OF_STRUCTURED)}: a schema, a regular expression, "
        "a list of texts, a Lark grammar, or true.",
    )


def json_grammar(schema: Mapping[str, Any], param: str) -> str:
    """JSON that a schema allows."""
    try:
        return _made("grammar_from_json_schema", json.dumps(schema))
    except ValueError as error:
        raise bad_field(param, f"{param} has a schema that cannot be followed ({error}): mend it.") from error


def choice_grammar(choices: Iterable[str]) -> str:
    """One of some texts."""
    return _made(
        "grammar_from_lark", "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in choices)
    )


def lark_grammar(lark: str) -> str:
    """What a grammar in Lark's words allows."""
    return _made("grammar_from_lark", lark)


def _made(maker: str, text: str) -> str:
    matcher = require("llguidance", extra="grammar", purpose="a grammar").LLMatcher
    made: str = getattr(matcher, maker)(text)
    return made
