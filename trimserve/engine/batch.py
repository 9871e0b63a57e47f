"""Continuous batching: all sequences advance in one run of the graph, prompts are read between two runs.

A step of the engine feeds a chunk of one prompt, if any is being read, then drafts, checks and feeds for all
sequences that decode. A sequence that ends leaves its row at once; a prompt that was read joins at once.
"""

import time
from collections.abc import Sequence

import numpy as np

from trimserve.arrays import Floats, Ids, Rows
from trimserve.decoding.columns import Columns
from trimserve.decoding.feeder import Feeder
from trimserve.decoding.logprobs import LogprobMeter, TokenLogprob
from trimserve.decoding.request import Draft, note_block
from trimserve.decoding.slots import DraftSlots
from trimserve.engine.deciding import Decider
from trimserve.engine.pace import Pace
from trimserve.engine.settings import EngineSettings
from trimserve.engine.strict import Proof
from trimserve.engine.table import RowTable
from trimserve.engine.task import Task
from trimserve.errors import NoTokenError
from trimserve.generation.generator import Generator

Ended = list[tuple[Task, Exception | None]]


class BatchRunner:
    """A `Runner` for graphs whose sequences share buffers (see `runtime/kv_rows.py`).

    Attributes:
        batching: see `EngineMetrics`.
        strict: see `EngineMetrics`.
        decode_steps: see `EngineMetrics`.
        decode_rows: see `EngineMetrics`.
    """

    def __init__(self, generator: Generator, settings: EngineSettings, proof: Proof) -> None:
        """Begin with nothing.

        Args:
            generator: the model.
            settings: the engine's.
            proof: what was found out about the graph.
        """
        self.strict = proof.is_strict
        self.batching = proof.batching
        self.decode_steps = self.decode_rows = 0
        self._generator = generator
        self._settings = settings
        self._proof = proof
        vocab = generator.folder.vocab
        self._head_vocab = vocab.head
        self._kept = Columns(vocab.head.kept_ids, vocab.vocab_size)
        self._feeder = Feeder(generator.decoder, vocab, generator.cold)
        self._decider = Decider(generator)
        self._fill = int(vocab.kept_ids[0])  # fed where nobody reads what comes of it
        most = settings.max_rows
        self._table = RowTable(
            generator.decoder.rows(max(most, proof.least_rows)),
            most=most,
            budget=settings.kv_memory,
            reuses=proof.reuses_prefixes,
        )
        self._reading: Task | None = None
        # What the graph gave for the last token of each sequence that decodes, in the order of their rows.
        self._logits: Floats = np.zeros((0, self._kept.ids.size), np.float32)
        self._hidden: Rows = np.zeros((0, generator.decoder.hidden_size), generator.decoder.dtype)
        self._pace = Pace(settings.chunk)
        self._seconds = 0.0

    def anew(self) -> "BatchRunner":
        """See `Runner`."""
        return BatchRunner(self._generator, self._settings, self._proof)

    @property
    def live(self) -> list[Task]:
        """What it works on."""
        return [*self._table.tasks, *([self._reading] if self._reading else [])]

    @property
    def kv_used_bytes(self) -> int:
        """See `EngineMetrics`."""
        return self._table.used_bytes

    @property
    def kv_bytes(self) -> int:
        """See `EngineMetrics`."""
        return self._table.held_bytes

    def takes(self, task: Task) -> bool:
        """Whether a request can be one of a batch.

        Raises:
            UsageError: it needs more memory than there is for all.
        """
        if task.plan.beams is not None or task.plan.report_mass:
            return False
        self._table.check(task)
        return True

    def fits(self, task: Task) -> bool:
        """Whether a request can start: its prompt is the next to be read, and there is room for it."""
        return self._reading is None and self._table.fits(task)

    def admit(self, task: Task) -> None:
        """Start to read a prompt, behind what another one has left of it."""
        self._table.admit(task)
        request = task.request
        cold_ids = request.given[~self._head_vocab.is_kept(request.given)]
        after_head = self._generator.decoder.after_head
        request.slots = DraftSlots(self._kept, self._generator.cold, after_head, cold_ids)
        self._reading = task

    def drop(self, task: Task) -> None:
        """End a request before its time, in its prompt, too."""
        if task is self._reading:
            self._reading = None
        else:
            # As the table does: the last row fills the hole.
            places = list(range(self._table.live))
            places[self._table.place_of(task)] = places[-1]
            self._logits, self._hidden = self._logits[places[:-1]], self._hidden[places[:-1]]
        self._table.release(task)
        self._count(task)

    def step(self) -> Ended:
        """See the module's docstring."""
        start = time.perf_counter()
        if self._reading is not None:
            self._read(self._reading)
        ended = self._advance(self._table.tasks) if self._table.live else []
        for task, _ in ended:
            self.drop(task)
        if self._table.live:
            self._feed([task.request.output[-1] for task in self._table.tasks])
        self._seconds += time.perf_counter() - start
        return ended

    def _read(self, task: Task) -> None:
        """Feed the next tokens of a prompt."""
        prompt, view = task.request.prompt, self._table.view_of(task)
        fed = int(view.lengths[0])
        left = prompt.size - fed
        chunk = self._pace.chunk(self._table.live) if self._proof.chunks else left
        # Never one token at the end.
        count = left if left <= chunk + 1 else chunk
        start = time.perf_counter()
        step = self._feeder.feed_prompt(view, prompt[fed : fed + count], is_last=count == left)
        self._pace.note_prompt(count, time.perf_counter() - start)
        self._table.has_read(task)
        if count == left:
            self._table.promote(task)
            self._reading = None
            self._logits = np.concatenate([self._logits, step.logits[:, -1]])
            self._hidden = np.concatenate([self._hidden, step.hidden[:, -1]])

    def _advance(self, tasks: Sequence[Task]) -> Ended:
        """Draft a block for each sequence, have it checked, tell the clients; gives those that ended."""
        blocks, errors = self._draft(tasks, self._decider.draft_length(tasks))
        fed = max(len(block.tokens) for block in blocks) - 1
        sound = [row for row, error in enumerate(errors) if error is None]
        decided = self._decider.decide([tasks[row] for row in sound], [blocks[row] for row in sound])
        drop = np.zeros(len(tasks), np.int64)
        for row, found in zip(sound, decided, strict=True):
            if isinstance(found, Exception):
                errors[row] = found
                continue
            taken = self._take(tasks[row], blocks[row], found)
            # Of the last token taken nothing is in the row yet; of the drafts after it everything.
            drop[row] = fed - (taken - 1)
        self._table.cut(drop)
        return [
            (task, error)
            for task, error in zip(tasks, errors, strict=True)
            if error is not None or task.request.finished
        ]

    def _take(self, task: Task, block: Draft, tokens: Sequence[int]) -> int:
        taken = task.request.accept(tokens)
        note_block(task.request, block, taken, self._kept)
        logprobs: Sequence[TokenLogprob] = ()
        if task.top_logprobs is not None:
            logprobs = self._meter().measure(block, taken, task.top_logprobs)
        task.push(taken, logprobs)
        return len(taken)

    def _draft(self, tasks: Sequence[Task], size: int) -> tuple[list[Draft], list[Exception | None]]:
        """Draft up to so many tokens a sequence; one that reaches a stop id, or an error, drafts no more."""
        tokens: list[list[int]] = [[] for _ in tasks]
        errors: list[Exception | None] = [None] * len(tasks)
        steps = [(self._logits, self._hidden)]
        seconds = 0.0
        for position in range(size):
            start = time.perf_counter()
            self._choose(tasks, tokens, errors, position)
            self._feeder.timing.sampler += time.perf_counter() - start
            if position == size - 1 or all(
                len(drafts) <= position or drafts[-1] in task.request.stop_ids
                for task, drafts in zip(tasks, tokens, strict=True)
            ):
                break
            # What has ended is fed its last token again: it has room for that, and it is cut.
            self._feed([drafts[-1] if drafts else self._fill for drafts in tokens])
            seconds += time.perf_counter() - start
            steps.append((self._logits, self._hidden))
        logits, hidden = (np.stack(parts, axis=1) for parts in zip(*steps, strict=True))
        mean = seconds / max(len(steps) - 1, 1)
        blocks = [
            Draft(drafts or [self._fill], logits[row, : len(drafts)], hidden[row, : len(drafts)], mean)
            for row, drafts in enumerate(tokens)
        ]
        return blocks, errors

    def _choose(
        self,
        tasks: Sequence[Task],
        tokens: Sequence[list[int]],
        errors: list[Exception | None],
        position: int,
    ) -> None:
        """Choose the next draft of each sequence that drafts on."""
        best: Ids | None = None
        for row, (task, drafts) in enumerate(zip(tasks, tokens, strict=True)):
            request = task.request
            if len(drafts) < position or (drafts and drafts[-1] in request.stop_ids):
                continue
            if request.params.takes_maximum and not (request.slots and request.slots.ids):
                best = self._kept.ids[self._logits.argmax(axis=1)] if best is None else best
                drafts.append(int(best[row]))
                continue
            try:
                drafts.append(request.draft(self._logits[row], self._hidden[row], drafts))
            except NoTokenError as error:
                if task.plan.mode == "exact":
                    # Only cold ids are allowed here: the check will find the right one.
                    drafts.append(int(self._kept.ids[self._logits[row].argmax()]))
                else:
                    errors[row] = error
            except Exception as error:
                errors[row] = error

    def _feed(self, tokens: Sequence[int]) -> None:
        """Feed one token to each sequence that decodes."""
        live = len(tokens)
        count = max(live, self._proof.least_rows)
        start = time.perf_counter()
        if count > live:
            self._table.pad(count)
        step = self._feeder.feed(self._table.view(count), [*tokens, *[self._fill] * (count - live)])
        if count > live:
            self._table.unpad(count)
        self._pace.note_step(time.perf_counter() - start)
        self._logits, self._hidden = step.logits[:live, -1], step.hidden[:live, -1]
        self.decode_steps += 1
        self.decode_rows += live

    def _meter(self) -> LogprobMeter:
        return LogprobMeter(self._generator.cold_head("top_logprobs"), self._kept.ids)

    def _count(self, task: Task) -> None:
        checks, reads = self._decider.take()
        timings = [self._feeder.timing.take(), checks]
        seconds, self._seconds = self._seconds, 0.0
        self._generator.stats.count([task.request], self._head_vocab, timings, seconds, reads)
