"""Which of `trimserve run`'s options mean something, by what it does: the one table of it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from trimserve.cli.rules import flag, given
from trimserve.errors import UsageError
from trimserve.folder.tasks import (
    ANSWERING_TASK,
    EMBEDDING_TASK,
    GENERATION_TASK,
    TEXT2TEXT_TASK,
    Task,
)

if TYPE_CHECKING:
    from trimserve.generation.plan import GenerationPlan

# Keyword arguments of Generator.generate that an option of the same name sets.
GENERATION: Final = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "mode", "report_mass"),
    *("do_sample", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "num_beams"),
    "length_penalty",
    "text_drafts",
)
READING: Final = ("text_column", "unit", "skip_bad", "max_line")
_PROMPTS: Final = ("prompt_name", "prompt", "batch_size")
# Options that choose what is done; else the folder's task does.
_CHOOSING: Final = ("corpus", "query", "pairs")


class Doing(NamedTuple):
    """Something that `run` does.

    Attributes:
        tasks: of the folders that can do it.
        options: those that mean something to it, besides the common ones.
    """

    tasks: tuple[Task, ...]
    options: tuple[str, ...]


# A sparse encoder's task is fill-mask; whether a folder is one is known when it is loaded.
DOINGS: Final[dict[str, Doing]] = {
    "generate": Doing((GENERATION_TASK, TEXT2TEXT_TASK), (*GENERATION, "forced_bos", "chat")),
    "search": Doing((EMBEDDING_TASK, "fill-mask"), ("corpus", *READING, "top", *_PROMPTS)),
    "rank": Doing(("text-classification",), ("query", "top", *_PROMPTS)),
    "pairs": Doing(("text-classification",), ("pairs", *_PROMPTS)),
    "embed": Doing((EMBEDDING_TASK,), _PROMPTS),
    "sparse": Doing(("fill-mask",), _PROMPTS),
    "mask": Doing(("fill-mask",), ("top", "targets", "batch_size")),
    "classify": Doing(("text-classification",), ("top", "batch_size")),
    "tag": Doing(("token-classification",), ("aggregation", "batch_size")),
    "answer": Doing((ANSWERING_TASK,), ("context", "top", "batch_size")),
}
OPTIONS: Final = tuple(dict.fromkeys(name for doing in DOINGS.values() for name in doing.options))


def check_options(args: argparse.Namespace, task: Task, *, sparse: bool | None = None) -> None:
    """Refuse options that what is done would pass over.

    Args:
        args: the command line of `run`.
        task: the folder's.
        sparse: whether the folder is a sparse encoder; None where that is not known yet.

    Raises:
        UsageError: options that mean nothing to the task, or choose two things at once.
    """
    chosen = given(args, _CHOOSING)
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(map(flag, chosen))} ask for different things: pass one of them.")
    doings = _doings(task, chosen, sparse=sparse)
    known = {name for doing in doings for name in doing.options}
    if strange := [name for name in given(args, OPTIONS) if name not in known]:
        raise _meaningless(args.folder, task, strange, chosen if doings else [])


def _doings(task: Task, chosen: list[str], *, sparse: bool | None) -> list[Doing]:
    """What is done with a folder of a task, or may be, as long as it is not known to be sparse."""
    choosing = {"corpus": "search", "query": "rank", "pairs": "pairs"}
    names = [choosing[name] for name in chosen] or [name for name in DOINGS if name not in choosing.values()]
    if sparse is not None:
        names = [name for name in names if name not in ({"mask"} if sparse else {"sparse"})]
        if not sparse and task == "fill-mask":
            names = [name for name in names if name != "search"]
    return [DOINGS[name] for name in names if task in DOINGS[name].tasks]


def _meaningless(folder: Path, task: Task, names: list[str], chosen: list[str]) -> UsageError:
    """The error that names the options, and what the first of them is for."""
    tasks = dict.fromkeys(
        task for doing in DOINGS.values() if names[0] in doing.options for task in doing.tasks
    )
    does = f"{task} with {flag(chosen[0])}" if chosen else task
    purpose = f"for {', '.join(tasks)}"
    if names[0] in READING or (names[0] == "top" and task == EMBEDDING_TASK):
        purpose = "for --corpus"
    elif task in tasks:
        purpose = "for something else that it can do"
    listed, them = ", ".join(map(flag, names)), "them" if len(names) > 1 else "it"
    means = "mean" if len(names) > 1 else "means"
    return UsageError(
        f"{folder} does {does}, for which {listed} {means} nothing ({flag(names[0])} is {purpose}): "
        f"leave {them} out."
    )


def check_plan(args: argparse.Namespace, plan: "GenerationPlan") -> None:
    """Refuse options that the plan of a generation passes over: of sampling where it is greedy.

    Raises:
        UsageError: the option and what it needs.
    """
    greedy = plan.params.temperature <= 0
    if greedy and (names := given(args, ("seed", "top_k", "top_p", "min_p"))):
        raise UsageError(
            f"{flag(names[0])} is about sampling, and nothing is sampled here: pass --temperature above 0 or "
            "--do-sample, or leave it out."
        )
    if greedy and args.temperature and args.do_sample is False:
        raise UsageError("--temperature above 0 samples and --no-do-sample does not: leave one of them out.")
    if greedy and args.do_sample and args.temperature == 0:
        raise UsageError("--do-sample samples and --temperature 0 does not: leave one of them out.")
    least, most = args.min_new_tokens, plan.max_new_tokens
    if least is not None and most is not None and least > most:
        raise UsageError(f"--min-new-tokens {least:,} is more than the {most:,} of --max-new-tokens.")
