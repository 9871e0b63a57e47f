"""Generator: text in, text out, for a trimmed folder of a causal language model."""

import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from types import MappingProxyType
from typing import Unpack

from trimserve.arguments import checked
from trimserve.arrays import Ids
from trimserve.concurrency import Once
from trimserve.decoding.beam import BeamParams, BeamSearch
from trimserve.decoding.loop import Checker, GenerationLoop
from trimserve.decoding.request import Request
from trimserve.decoding.scoring import MassMeter, Score, Scorer
from trimserve.decoding.stats import ColdReads, GeneratorStats
from trimserve.errors import UsageError
from trimserve.exact.certificate import ColdCertificate
from trimserve.exact.checker import ExactChecker
from trimserve.exact.draft_length import DraftLength, LearnedCosts
from trimserve.exact.sketch import Sketch, can_be_certified
from trimserve.folder.names import COLD_MAX_NAME
from trimserve.folder.opening import TrimmedFolder
from trimserve.generation.clients import AsyncClients, MakeClients
from trimserve.generation.config import GenerationConfig
from trimserve.generation.options import GenerationOptions
from trimserve.generation.output import Generation, OutputReader
from trimserve.generation.plan import GenerationPlan, make_plan
from trimserve.runtime.cold_head import ColdHead
from trimserve.runtime.cold_rows import ColdRows
from trimserve.runtime.decoder import Decoder
from trimserve.runtime.row_costs import RowCosts, measure_rows
from trimserve.text.chat import Message, render_chat
from trimserve.text.codec import Codec


class Generator:
    """A trimmed causal language model behind its original tokenizer.

    Example:
        >>> model = trimserve.load("qwen3-tickets")  # doctest: +SKIP
        >>> model.generate("Summarise: …", max_new_tokens=64)[0].text  # doctest: +SKIP
    """

    # Options that would be ignored, and what to do instead.
    _other_options: Mapping[str, str] = MappingProxyType(
        {"decoder_start_token_id": "leave it out, only an encoder-decoder has it"}
    )

    def __init__(
        self,
        folder: TrimmedFolder,
        decoder: Decoder,
        codec: Codec,
        cold: ColdRows,
        *,
        threads: int | None = None,
        overlap: bool | None = None,
        clients: MakeClients | None = None,
    ) -> None:
        self.folder = folder
        self.codec = codec
        self.config = GenerationConfig(folder)
        self.stop_ids = self.config.stop_ids
        self._cold = cold
        self._threads = threads
        # The decoder on a device leaves the CPU free for checking; on the CPU both want the same cores.
        self._overlap = decoder.device != "cpu" if overlap is None else overlap
        self._decoder = decoder
        self._head: Once[ColdHead] = Once()
        self._certificate: Once[ColdCertificate | None] = Once()
        self._row_costs: Once[RowCosts] = Once()
        row_bytes = cold.head_nbytes // max(cold.head_cold_ids.size, 1)
        reads = ColdReads(full_bytes=cold.head_nbytes, row_bytes=row_bytes)
        self.stats = GeneratorStats(cold_reads=reads, head_share=decoder.head_share)
        self._make_clients = clients
        self._clients: Once[AsyncClients] = Once()
        # By the longest block, and whether checks may use the certificate, which makes them cheaper.
        self._learned: dict[tuple[int, bool], LearnedCosts] = {}

    def __repr__(self) -> str:
        mode = "exact" if self.can_be_exact else "compact"
        return f"<{type(self).__name__} {self.folder}, {mode} mode>"

    @property
    def decoder(self) -> Decoder:
        """The graph that generates."""
        return self._decoder

    @property
    def cold(self) -> ColdRows:
        """Rows of the cold ids."""
        return self._cold

    @property
    def can_be_exact(self) -> bool:
        """Whether the folder holds what exact mode needs; nothing where every id is kept."""
        return COLD_MAX_NAME in self.folder.manifest.files or not self.folder.vocab.head.cold_ids.size

    @checked
    def generate(
        self, prompts: str | Sequence[str], **options: Unpack[GenerationOptions]
    ) -> list[Generation]:
        """Generate for one prompt or several.

        Args:
            prompts: texts; the tokenizer adds its special tokens.
            **options: see `GenerationOptions`.

        Returns:
            One result a prompt, in order.

        Raises:
            UsageError: an option out of range, or exact mode without cold rows.
            UnknownIdError: a prompt holds a token that the model has no row for.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self._generate(self.codec.encode(texts), options)

    @checked
    def stream(self, prompt: str, **options: Unpack[GenerationOptions]) -> Iterator[str]:
        """Generate for one prompt, giving text as soon as it is certain.

        In exact mode only checked tokens are released; a character is never split. Arguments and errors
        are those of `generate`.
        """
        (ids,) = self.codec.encode([prompt])
        yield from self._stream(ids, options)

    @checked
    def chat(self, messages: Sequence[Message], **options: Unpack[GenerationOptions]) -> Generation:
        """Answer a conversation, through the folder's own chat template.

        Args:
            messages: ``{"role": ..., "content": ...}`` each, oldest first.
            **options: see `GenerationOptions`.

        Raises:
            UsageError: the folder has no chat template, or it refuses the messages; see also `generate`.
            MissingExtraError: jinja2 is not installed.
        """
        (result,) = self._generate([self.chat_ids(messages)], options)
        return result

    @checked
    def stream_chat(self, messages: Sequence[Message], **options: Unpack[GenerationOptions]) -> Iterator[str]:
        """Like `chat`, giving text as soon as it is certain."""
        yield from self._stream(self.chat_ids(messages), options)

    @checked
    async def agenerate(
        self, prompts: str | Sequence[str], **options: Unpack[GenerationOptions]
    ) -> list[Generation]:
        """Like `generate`, for async code: the event loop goes on, and calls run beside each other.

        Where the graph takes it they share its steps; each has the tokens that it has alone (docs/engine.md).
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        return await self._async_clients().generate(self.codec.encode(texts), options)

    @checked
    async def astream(self, prompt: str, **options: Unpack[GenerationOptions]) -> AsyncGenerator[str]:
        """Like `stream`, for async code; a caller that leaves ends the request."""
        (ids,) = self.codec.encode([prompt])
        async with aclosing(self._async_clients().stream(ids, options)) as pieces:
            async for piece in pieces:
                yield piece

    @checked
    async def achat(self, messages: Sequence[Message], **options: Unpack[GenerationOptions]) -> Generation:
        """Like `chat`, for async code."""
        (result,) = await self._async_clients().generate([self.chat_ids(messages)], options)
        return result

    @checked
    async def astream_chat(
        self, messages: Sequence[Message], **options: Unpack[GenerationOptions]
    ) -> AsyncGenerator[str]:
        """Like `stream_chat`, for async code."""
        async with aclosing(self._async_clients().stream(self.chat_ids(messages), options)) as pieces:
            async for piece in pieces:
                yield piece

    def _async_clients(self) -> AsyncClients:
        make = self._make_clients
        if make is None:
            raise UsageError(
                f"{self.folder.path} was not opened for async code: open it with trimserve.load."
            )
        return self._clients.get(lambda: make(self))

    @checked
    def chat_ids(self, messages: Sequence[Message]) -> Ids:
        """The prompt's token ids for a conversation, int32 (T,)."""
        prompt = render_chat(self.folder, messages)
        # The template writes the special tokens itself.
        (ids,) = self.codec.encode([prompt], add_special_tokens=False)
        return ids

    @checked
    def score(self, texts: str | Sequence[str]) -> list[Score]:
        """Log-probabilities of texts under the full model's vocab.

        Args:
            texts: one text or several; the tokenizer adds its special tokens.

        Raises:
            UsageError: the folder has no cold head.
            UnknownIdError: a text holds a token that the model has no row for.
        """
        head = self.cold_head("score")
        scorer = Scorer(self._decoder, self.folder.vocab, self._cold, head)
        return [scorer.score(ids) for ids in self.codec.encode([texts] if isinstance(texts, str) else texts)]

    def _generate(self, prompts: Sequence[Ids], options: GenerationOptions) -> list[Generation]:
        plan = self.plan(options)
        requests = self.requests(prompts, plan)
        together = self._decoder.takes_batches and not plan.report_mass
        batches = [requests] if together else [[request] for request in requests]
        results: list[Generation] = []
        for batch in batches:
            readers = {id(request): self.reader(request, plan) for request in batch}
            checker = None if plan.beams else self.checker(plan)
            for request, tokens in self.run(batch, plan, checker):
                readers[id(request)].push(request, tokens)
            mass = checker.mean_mass if isinstance(checker, MassMeter) else None
            results += [readers[id(request)].result(request, mass) for request in batch]
        return results

    def _stream(self, prompt_ids: Ids, options: GenerationOptions) -> Iterator[str]:
        plan = self.plan(options)
        if plan.beams is not None:
            raise UsageError("beams are known when the search is over: use generate, or num_beams=1.")
        (request,) = self.requests([prompt_ids], plan)
        reader = self.reader(request, plan)
        checker = self.checker(plan)
        for _, tokens in self.run([request], plan, checker):
            if piece := reader.push(request, tokens):
                yield piece
        if piece := reader.finish():
            yield piece

    def plan(self, options: GenerationOptions) -> GenerationPlan:
        """What a call with these options does: the folder's generation settings, overridden by them.

        Raises:
            UsageError: an option that does not exist, is out of range, or does not go with another.
        """
        for name, advice in self._other_options.items():
            if options.get(name) is not None:
                raise UsageError(f"{name} means nothing to {self.folder.path}: {advice}.")
        size = self.folder.vocab.vocab_size
        return make_plan(self.config, options, size, can_be_exact=self.can_be_exact)

    def reader(self, request: Request, plan: GenerationPlan) -> OutputReader:
        """What turns a request's tokens into text."""
        by_bytes = self.config.library >= 5
        return OutputReader(self.codec, plan.stop, plan.stop_strings, request.prompt, by_bytes=by_bytes)

    def requests(self, prompts: Sequence[Ids], plan: GenerationPlan) -> list[Request]:
        """One request a prompt, int32 (T,) each.

        Raises:
            UsageError: a prompt is too long for the model, or leaves no room within `max_length`.
            UnknownIdError: it holds a token that the model has no row for.
        """
        started = [ids if ids.size else self.config.first_id(plan.settings) for ids in prompts]
        requests = []
        for place, ids in enumerate(self._servable(started), 1):
            room = self._room(place, ids)
            limit = plan.limit(ids.size)
            most = limit if room is None else min(limit, room)
            requests.append(Request(ids, plan.params_for(limit), most, plan.stop_ids, room=room))
        return requests

    def _room(self, place: int, prompt: Ids) -> int | None:
        """Tokens that can follow a prompt before the model's table of positions ends."""
        context = self.config.context
        if context is None:
            return None
        if prompt.size > context:
            raise UsageError(
                f"text {place} has {prompt.size:,} tokens, this model reads {context:,} at most: shorten it."
            )
        return context - prompt.size + 1  # the last one is produced and not fed

    def _servable(self, sequences: Sequence[Ids]) -> Sequence[Ids]:
        """The sequences with ids that the folder has rows for; counts cold tokens."""
        servable = self.codec.servable(sequences)
        self.stats.count_cold(servable.cold_tokens)
        return servable.sequences

    def run(
        self, requests: Sequence[Request], plan: GenerationPlan, checker: Checker | None
    ) -> Iterator[tuple[Request, list[int]]]:
        """Generate for requests that share a cache, giving each one's tokens as they come.

        Args:
            requests: one, or several where the graph takes batches.
            plan: what they do.
            checker: see `checker`; None with beams.
        """
        if plan.beams is not None:
            yield from self._search(requests, plan, plan.beams)
            return
        loop = GenerationLoop(
            self._decoder,
            self.folder.vocab,
            self._cold,
            checker,
            overlap=self._overlap,
            row_costs=self._several(plan),
        )
        start = time.perf_counter()
        try:
            yield from loop.run(requests)
        finally:
            seconds = time.perf_counter() - start
            timings = [loop.timing, *([checker.timing] if checker else [])]
            reads = checker.reads if checker else None
            self.stats.count(requests, self.folder.vocab.head, timings, seconds, reads)

    def _several(self, plan: GenerationPlan) -> Callable[[], RowCosts] | None:
        if not plan.text_drafts:
            return None
        if (reason := self._decoder.no_several_because) is not None:
            raise UsageError(
                f"{self.folder.path} cannot draft from the text ({reason}): leave text_drafts out."
            )
        return self.measured_rows

    def measured_rows(self) -> RowCosts:
        """What steps of several tokens cost here, measured when it is asked for the first time."""
        kept = self.folder.vocab.kept_ids.size
        return self._row_costs.get(lambda: measure_rows(self._decoder, kept, self.config.context))

    def _search(
        self, requests: Sequence[Request], plan: GenerationPlan, params: BeamParams
    ) -> Iterator[tuple[Request, list[int]]]:
        head = self.cold_head("exact mode") if plan.mode == "exact" else None
        search = BeamSearch(self._decoder, self.folder.vocab, self._cold, head, params)
        start = time.perf_counter()
        search.run(requests)
        self.stats.count(requests, self.folder.vocab.head, [search.timing], time.perf_counter() - start)
        yield from ((request, request.output) for request in requests)

    def checker(self, plan: GenerationPlan) -> Checker | None:
        """Who decides which drafts stand; None in compact mode, where all do.

        Raises:
            UsageError: the folder has not what it needs.
        """
        if plan.mode == "compact" and not plan.report_mass:
            return None
        head = self.cold_head("report_mass" if plan.report_mass else "exact mode")
        if head is None:
            return None
        if plan.report_mass:
            return MassMeter(head)
        learned = self._learned.setdefault((plan.max_block, plan.certify), LearnedCosts())
        block = DraftLength(plan.max_block, overlap=self._overlap, learned=learned)
        return self.exact_checker(block, certify=plan.certify)

    def exact_checker(self, block: DraftLength, *, certify: bool = True) -> ExactChecker | None:
        """Who decides in exact mode which drafts stand; None where no id is cold.

        Args:
            block: how many tokens are drafted.
            certify: prove what can be proven without the cold rows.

        Raises:
            UsageError: the folder has no cold head.
        """
        head = self.cold_head("exact mode")
        if head is None:
            return None
        shared = self._certificate.get(lambda: self._make_certificate(head)) if certify else None
        reads = self.stats.cold_reads.nothing_yet()
        certificate = None if shared is None else shared.counting(reads)
        return ExactChecker(head, self.folder.vocab.head, block, certificate, reads)

    def _make_certificate(self, head: ColdHead) -> ColdCertificate | None:
        """None where the folder has no sketch, or it proves nothing here."""
        after_head = self._decoder.after_head
        if not can_be_certified(self.folder, after_head):
            return None
        sketch = Sketch(self.folder, self._cold, after_head, threads=self._threads)
        return ColdCertificate(sketch, head, self.folder.vocab.head)

    def cold_head(self, purpose: str) -> ColdHead | None:
        """The cold head, opened once; None where no id is cold.

        Raises:
            UsageError: the folder has none; the message says what needs it.
        """
        if not self.can_be_exact:
            raise UsageError(
                f"{purpose} needs the cold head, which {self.folder.path} does not have: export it again "
                "without --no-cold, or use compact mode."
            )
        if not self.folder.vocab.head.cold_ids.size:
            return None
        return self._head.get(lambda: ColdHead(self.folder, threads=self._threads))
