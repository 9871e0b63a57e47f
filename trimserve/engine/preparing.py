"""A client's request becomes a task: everything that can be wrong with it is found before it is queued."""

import time

from trimserve.engine.handle import Handle
from trimserve.engine.settings import GenerationRequest
from trimserve.engine.task import Task
from trimserve.errors import UsageError
from trimserve.generation.generator import Generator
from trimserve.generation.plan import GenerationPlan


def prepare(generator: Generator, asked: GenerationRequest, handle: Handle) -> Task:
    """Check a request and make what will run it.

    Raises:
        UsageError: it cannot be honoured.
        UnknownIdError: its prompt holds a token that the model has no row for.
    """
    plan = generator.plan(asked.options)  # type: ignore[arg-type] # checked there
    (request,) = generator.requests([asked.prompt], plan)
    _check_logprobs(asked.top_logprobs, plan)
    if plan.text_drafts:
        raise UsageError(
            "text_drafts is for generate and stream: an engine's batches take none, leave it out."
        )
    for wanted, purpose in (
        (plan.mode == "exact", "exact mode"),
        (plan.report_mass, "report_mass"),
        (asked.top_logprobs is not None, "top_logprobs"),
    ):
        if wanted:
            generator.cold_head(purpose)
    deadline = None if asked.timeout is None else time.monotonic() + asked.timeout
    return Task(handle, plan, request, generator.reader(request, plan), asked.top_logprobs, deadline)


def _check_logprobs(top: int | None, plan: GenerationPlan) -> None:
    if top is not None and plan.beams:
        raise UsageError("top_logprobs means nothing to a beam search: leave it out, or use num_beams=1.")
    if top is not None and top < 0:
        raise UsageError(f"top_logprobs should be 0 or more, found {top}.")
