"""The tasks that a folder can do, by optimum's names."""

# The tasks of a Generator; any other is an Encoder's.
GENERATION_TASK = "text-generation-with-past"
TEXT2TEXT_TASK = "text2text-generation-with-past"
GENERATOR_TASKS = (GENERATION_TASK, TEXT2TEXT_TASK)
EMBEDDING_TASK = "feature-extraction"
ANSWERING_TASK = "question-answering"
ENCODER_TASKS = (
    "feature-extraction",
    "fill-mask",
    "text-classification",
    "token-classification",
    ANSWERING_TASK,
)
