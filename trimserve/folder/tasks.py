"""The tasks that a folder can do, by optimum's names."""

from typing import Final, Literal

Task = Literal[
    "text-generation-with-past",
    "text2text-generation-with-past",
    "feature-extraction",
    "fill-mask",
    "text-classification",
    "token-classification",
    "question-answering",
]
# The tasks of a Generator; any other is an Encoder's.
GENERATION_TASK: Final = "text-generation-with-past"
TEXT2TEXT_TASK: Final = "text2text-generation-with-past"
GENERATOR_TASKS: tuple[Task, ...] = (GENERATION_TASK, TEXT2TEXT_TASK)
EMBEDDING_TASK: Final = "feature-extraction"
ANSWERING_TASK: Final = "question-answering"
ENCODER_TASKS: tuple[Task, ...] = (
    EMBEDDING_TASK,
    "fill-mask",
    "text-classification",
    "token-classification",
    ANSWERING_TASK,
)


def has_vocab_head(task: str) -> bool:
    """Tell whether a task's graph makes logits over the vocab."""
    return task in ("fill-mask", *GENERATOR_TASKS)
