"""Generator for encoder-decoders: a source text in, its translation, summary or answer out."""

from collections.abc import Sequence
from types import MappingProxyType

import numpy as np

from trimserve.arguments import checked
from trimserve.arrays import Ids
from trimserve.decoding.loop import Checker, InStep
from trimserve.decoding.request import Request
from trimserve.decoding.scoring import Score, Scorer
from trimserve.errors import UsageError
from trimserve.exact.checker import ExactChecker
from trimserve.generation.generator import Generator
from trimserve.generation.plan import GenerationPlan


class Text2TextGenerator(Generator):
    """A trimmed encoder-decoder behind its original tokenizer; all else is as for any `Generator`.

    Prompts are source texts. Options, modes, streaming and statistics are those of `Generator`.

    Example:
        >>> model = trimserve.load("opus-mt-en-de-tickets")  # doctest: +SKIP
        >>> model.generate("Where is my parcel?", num_beams=4)[0].text  # doctest: +SKIP
    """

    _other_options = MappingProxyType({"bos_token_id": "pass decoder_start_token_id"})

    @checked
    def score(self, texts: str | Sequence[str], sources: str | Sequence[str] | None = None) -> list[Score]:
        """Log-probabilities of texts under the full model's vocab, each after its source.

        Args:
            texts: what the decoder would have to say; the tokenizer adds its special tokens. A model that
                forces its first token (a language) has it instead of the tokenizer's.
            sources: one for each text.

        Raises:
            UsageError: not as many sources as texts, or the folder has no cold head.
            UnknownIdError: a text holds a token that the model has no row for.
        """
        targets = [texts] if isinstance(texts, str) else list(texts)
        given = [sources] if isinstance(sources, str) else list(sources or ())
        if len(given) != len(targets):
            raise UsageError(
                f"an encoder-decoder scores texts by their sources: found {len(given)} sources for "
                f"{len(targets)} texts."
            )
        scorer = Scorer(self._decoder, self.folder.vocab, self._cold, self.cold_head("score"))
        pairs = zip(self.codec.encode(targets), self.codec.encode(given), strict=True)
        return [scorer.score(self._as_output(target), source) for target, source in pairs]

    def _as_output(self, target: Ids) -> Ids:
        """The decoder's tokens for a text: its start, then what it would say."""
        rules = self.config.rules(0)
        forced = np.array(rules.forced_bos_token_id if rules else (), np.int32)
        if forced.size and target.size and int(target[0]) in self.codec.special_ids:
            target = target[1:]
        return np.concatenate([self.config.decoder_start(), forced, target])

    def requests(self, prompts: Sequence[Ids], plan: GenerationPlan) -> list[Request]:
        """One request a source text; errors as of `Generator.requests`."""
        start = self.config.decoder_start(plan.settings.get("decoder_start_token_id"))
        sources = self._servable(prompts)
        self._check_lengths(sources)
        limit = plan.limit(start.size)
        # A table of positions ends somewhere: nothing can be computed after that.
        most = limit if self.config.positions is None else min(limit, self.config.positions)
        params = plan.params_for(limit)
        return [Request(start, params, most, plan.stop_ids, source=source) for source in sources]

    def _check_lengths(self, sources: Sequence[Ids]) -> None:
        positions = self.config.positions
        for place, source in enumerate(sources, 1):
            if not source.size:
                raise UsageError(f"text {place} is empty: an encoder-decoder needs something to read.")
            if positions is not None and source.size > positions:
                raise UsageError(
                    f"text {place} has {source.size:,} tokens, this model's encoder reads {positions:,} at "
                    "most: split the text."
                )

    def checker(self, plan: GenerationPlan) -> Checker | None:
        """See `Generator.checker`; all sequences advance by equally many tokens."""
        checker = super().checker(plan)
        return InStep(checker) if isinstance(checker, ExactChecker) else checker
