"""Token ids with their texts, as OpenAI's API shows them."""

from collections.abc import Sequence
from typing import Any

from trimserve.decoding.logprobs import TokenLogprob
from trimserve.text.codec import Codec
from trimserve.text.stop_matcher import TokenBytes


class TokenTexts:
    """The text of single tokens; one for each model, since it keeps what it has decoded."""

    def __init__(self, codec: Codec) -> None:
        self._bytes = TokenBytes(codec.tokenizer, by_bytes=True)

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to a text; part of a character for some."""
        return self._bytes.of(token_id)

    def text(self, token_id: int) -> str:
        """The same as text; a part of a character is a replacement character."""
        return self.bytes_of(token_id).decode("utf-8", "replace")

    def chat_logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """`choices[].logprobs` of a chat."""
        return {
            "content": [
                self._entry(one.id, one.logprob) | {"top_logprobs": self._top(one)} for one in logprobs
            ]
        }

    def _top(self, one: TokenLogprob) -> list[dict[str, Any]]:
        return [self._entry(*pair) for pair in one.top]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelled = self.bytes_of(token_id)
        return {"token": self.text(token_id), "logprob": logprob, "bytes": list(spelled)}

    def completion_logprobs(
        self, logprobs: Sequence[TokenLogprob], *, top: int, start: int
    ) -> dict[str, Any]:
        """`choices[].logprobs` of a completion.

        Args:
            logprobs: of its tokens.
            top: how many alternatives were asked for.
            start: characters of the text before the first of these tokens.
        """
        texts = [self.text(one.id) for one in logprobs]
        offsets: list[int] = []
        for text in texts:
            offsets.append(start)
            start += len(text)
        alternatives = [{self.text(id_): value for id_, value in one.top} for one in logprobs]
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": alternatives if top else None,
            "text_offset": offsets,
        }
