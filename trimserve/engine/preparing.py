"""A client's request becomes a task: everything that can be wrong with it is found before it is queued."""

import time

from trimserve.decoding.logprobs import LogprobMeter
from trimserve.engine.handle import Handle
from trimserve.engine.settings import GenerationRequest
from trimserve.engine.task import Task
from trimserve.errors import UsageError
from trimserve.generation.generator import Generator


def prepare(generator: Generator, asked: GenerationRequest, handle: Handle) -> Task:
    """Check a request and make what will run it.

    Raises:
        UsageError: it cannot be honoured.
        UnknownIdError: its prompt holds a token that the model has no row for.
    """
    plan = generator.plan(asked.options)  # type: ignore[arg-type] # checked there
    (request,) = generator.requests([asked.prompt], plan)
    checker = None if plan.beams else generator.checker(plan)
    meter = None
    if asked.top_logprobs is not None:
        if plan.beams:
            raise UsageError("top_logprobs means nothing to a beam search: leave it out, or use num_beams=1.")
        if asked.top_logprobs < 0:
            raise UsageError(f"top_logprobs should be 0 or more, found {asked.top_logprobs}.")
        head = generator.cold_head("top_logprobs")
        kept = generator.folder.vocab.head.kept_ids
        meter = checker = LogprobMeter(checker, head, kept, asked.top_logprobs)
    deadline = None if asked.timeout is None else time.monotonic() + asked.timeout
    reader = generator.reader(request, plan)
    return Task(handle, plan, request, reader, checker, meter, deadline)
