"""TODO: trimserve/folder/tasks.py."""

# The tasks of a Generator; any other is an Encoder's.
GENERATION_TASK = "text-generation-with-past"
TEXT2TEXT_TASK = "text2text-generation-with-past"
GENERATOR_TASKS = (GENERATION_TASK, TEXT2TEXT_TASK)
