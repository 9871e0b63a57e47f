"""The engine: one a folder, one thread, many requests at once, each with the tokens that it has alone.

What a client sees (the server is one, `Generator.agenerate` another)::

    engine = Engine(trimserve.load("qwen3-tickets"), EngineSettings(max_queued_requests=64))
    handle = engine.submit(GenerationRequest(ids, {"max_new_tokens": 64, "temperature": 0.7}, top_logprobs=3))
    for event in handle.events():           # or: async for event in handle.aevents()
        match event:
            case Piece(ids, text, logprobs): ...   # checked tokens, the text that became certain with them
            case Finished(text, generation, reason, usage, strict): ...  # the last event
            case Failed(error): ...                                      # the last event
    handle.cancel()                         # from any thread; ends with Finished(reason="cancelled")
    future = engine.call(lambda model: model.encode(texts), tokens=512)  # encoders, scores: any other work
    engine.metrics()                        # EngineMetrics, from any thread
    engine.drain(timeout=30)                # nothing new is taken; True when all is finished
    engine.close()                          # what runs is cancelled

- `submit` and `call` raise `QueueFull` where the queue has no room (it has `retry_after`, seconds),
  `EngineClosed` after `drain` or `close`, and `UsageError` for a request that cannot be honoured: its prompt
  is too long, an option is wrong. They do not wait.
- A request is one sequence: `n` choices are n requests, with seeds of their own.
- `engine.model` is the `Generator` or `Encoder` that the folder holds: its `codec`, `folder`, `chat_ids` and
  `plan` may be used from any thread.
"""

from typing import TYPE_CHECKING

from trimserve.faces import lazy_face

if TYPE_CHECKING:
    from trimserve.decoding.logprobs import TokenLogprob as TokenLogprob
    from trimserve.engine.engine import Engine as Engine
    from trimserve.engine.errors import EngineClosed as EngineClosed
    from trimserve.engine.errors import QueueFull as QueueFull
    from trimserve.engine.events import Event as Event
    from trimserve.engine.events import Failed as Failed
    from trimserve.engine.events import Finished as Finished
    from trimserve.engine.events import Piece as Piece
    from trimserve.engine.events import Usage as Usage
    from trimserve.engine.handle import Handle as Handle
    from trimserve.engine.metrics import EngineMetrics as EngineMetrics
    from trimserve.engine.settings import EngineSettings as EngineSettings
    from trimserve.engine.settings import GenerationRequest as GenerationRequest

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "Engine": "trimserve.engine.engine",
        "EngineClosed": "trimserve.engine.errors",
        "EngineMetrics": "trimserve.engine.metrics",
        "EngineSettings": "trimserve.engine.settings",
        "Event": "trimserve.engine.events",
        "Failed": "trimserve.engine.events",
        "Finished": "trimserve.engine.events",
        "GenerationRequest": "trimserve.engine.settings",
        "Handle": "trimserve.engine.handle",
        "Piece": "trimserve.engine.events",
        "QueueFull": "trimserve.engine.errors",
        "TokenLogprob": "trimserve.decoding.logprobs",
        "Usage": "trimserve.engine.events",
    },
)
