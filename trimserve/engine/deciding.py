"""Which drafts of a batch stand: one check for all its requests, of which none pays for another's error."""

from collections.abc import Sequence
from dataclasses import dataclass

from trimserve.decoding.request import Draft
from trimserve.decoding.stats import ColdReads, Timing
from trimserve.engine.task import Task
from trimserve.exact.checker import ExactChecker
from trimserve.exact.draft_length import DraftLength
from trimserve.generation.generator import Generator

# Tokens of each sequence, or what went wrong with it.
Decided = list[int] | Exception


@dataclass(slots=True, eq=False)
class _Check:
    """What checks batches of some size: how long their drafts are is learned for that size."""

    checker: ExactChecker | None
    length: DraftLength
    longest: int


class Decider:
    """Decides for the sequences of a batch, those in exact mode with one product."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._checks: dict[tuple[int, bool, int], _Check] = {}

    def draft_length(self, tasks: Sequence[Task]) -> int:
        """How many tokens each sequence drafts next; one where the first of a sequence is waited for."""
        exact = _exact(tasks)
        if not exact or not all(task.request.output for task in tasks):
            return 1
        left = min(task.request.max_tokens - len(task.request.output) for task in tasks)
        return max(1, min(self._check(exact).length.size, left))

    def decide(self, tasks: Sequence[Task], blocks: Sequence[Draft]) -> list[Decided]:
        """The tokens of each sequence, up to and with the first that replaces a draft."""
        decided: list[Decided] = [block.tokens for block in blocks]
        # A processor of a client's own may raise; nothing else of a check belongs to one request.
        shared = [i for i, task in enumerate(tasks) if task.plan.mode == "exact" and not _own(task)]
        apart = [i for i, task in enumerate(tasks) if task.plan.mode == "exact" and _own(task)]
        for group in ([shared] if shared else []) + [[place] for place in apart]:
            for place, found in zip(group, self._decide(tasks, blocks, group), strict=True):
                decided[place] = found
        return decided

    def take(self) -> tuple[Timing, ColdReads]:
        """What checks have cost since this was asked for."""
        timing, reads = Timing(), ColdReads()
        for check in self._checks.values():
            if check.checker is not None:
                timing.add(check.checker.timing.take())
                reads.add(check.checker.reads.take())
        return timing, reads

    def _decide(
        self, tasks: Sequence[Task], blocks: Sequence[Draft], group: Sequence[int]
    ) -> Sequence[Decided]:
        check = self._check(_exact(tasks))
        if check.checker is None:
            return [blocks[place].tokens for place in group]
        try:
            return check.checker.check([tasks[i].request for i in group], [blocks[i] for i in group])
        except Exception as error:
            if len(group) == 1:
                return [error]
        # Rare: whose it was shows when each is checked alone, on logits that may have been written to only
        # where its rules ban.
        return [found for place in group for found in self._decide(tasks, blocks, [place])]

    def _check(self, exact: Sequence[Task]) -> _Check:
        rows = 1 << (len(exact) - 1).bit_length()
        longest = min(task.plan.max_block for task in exact)
        certify = all(task.plan.certify for task in exact)
        found = self._checks.get((rows, certify, longest))
        if found is None:
            length = DraftLength(longest)
            checker = self._generator.exact_checker(length, certify=certify)
            found = self._checks[rows, certify, longest] = _Check(checker, length, longest)
        return found


def _exact(tasks: Sequence[Task]) -> list[Task]:
    return [task for task in tasks if task.plan.mode == "exact"]


def _own(task: Task) -> bool:
    return task.request.params.logits_processor is not None
