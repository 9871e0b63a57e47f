"""`trimserve run`: generate or embed with a trimmed folder, by its task."""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from trimserve.cli.arguments import add_memory, add_text_arguments, named_path
from trimserve.cli.commands._options import GENERATION, OPTIONS, READING, check_options, check_plan
from trimserve.cli.inputs import encodable_word, read_stdin, read_texts
from trimserve.cli.output import emit
from trimserve.errors import UsageError
from trimserve.folder.tasks import GENERATOR_TASKS, TEXT2TEXT_TASK
from trimserve.stdout import data_stream

if TYPE_CHECKING:
    from trimserve.generation.generator import Generator
    from trimserve.generation.options import GenerationOptions
    from trimserve.generation.output import Generation

STDIN = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; None stands for the model's or the function's own default."""
    parser.add_argument("folder", type=named_path, metavar="DIR", help="a trimmed folder")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="prompts or texts; - or none: from stdin")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of one operator")
    add_memory(parser)
    generation = parser.add_argument_group("generators")
    generation.add_argument(
        "--mode",
        choices=("exact", "compact"),
        help="the full model's tokens (default where the folder has cold rows), or kept ids alone",
    )
    generation.add_argument("--max-new-tokens", type=int, metavar="N", help="default: the folder's, else 128")
    generation.add_argument(
        "--temperature", type=float, metavar="T", help="0 is greedy (default: the folder's)"
    )
    generation.add_argument("--top-k", type=int, metavar="N", help="sample among the N likeliest tokens")
    generation.add_argument(
        "--top-p", type=float, metavar="P", help="sample among the first P of probability"
    )
    generation.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P of the likeliest")
    generation.add_argument("--seed", type=int, metavar="N", help="of the random numbers (default: 0)")
    generation.add_argument(
        "--do-sample",
        action=argparse.BooleanOptionalAction,
        help="sample, or be greedy (default: the folder's)",
    )
    generation.add_argument("--repetition-penalty", type=float, metavar="P", help="default: the folder's")
    generation.add_argument("--no-repeat-ngram-size", type=int, metavar="N", help="no run of N tokens twice")
    generation.add_argument("--min-new-tokens", type=int, metavar="N", help="no end before so many tokens")
    generation.add_argument(
        "--stop", action="append", metavar="TEXT", help="ends the output; can be repeated"
    )
    generation.add_argument(
        "--num-beams", type=int, metavar="N", help="search with N beams; the text comes when it is over"
    )
    generation.add_argument(
        "--length-penalty", type=float, metavar="P", help="of beams: below 1 favours short ones"
    )
    generation.add_argument(
        "--forced-bos", metavar="TOKEN", help="the first token, for example a language's: fra_Latn"
    )
    generation.add_argument(
        "--chat", action="store_true", default=None, help="each prompt is a user's message (chat template)"
    )
    generation.add_argument(
        "--report-mass",
        action="store_true",
        default=None,
        help="compact mode: the probability of what it cannot produce",
    )
    generation.add_argument(
        "--text-drafts",
        action="store_true",
        default=None,
        help="several tokens a step where the text repeats itself (summaries, edits), as far as it pays",
    )
    encoding = parser.add_argument_group("encoders")
    encoding.add_argument(
        "--corpus", metavar="FILE", help="texts to search in: a text a line, or a table; see `profile`"
    )
    add_text_arguments(encoding)
    encoding.add_argument(
        "--top", type=int, metavar="N", help="hits a query, tokens a mask (5), labels, answers"
    )
    encoding.add_argument("--targets", nargs="+", metavar="WORD", help="masks: choose among these words")
    encoding.add_argument(
        "--aggregation",
        choices=("none", "simple", "first", "average", "max"),
        help="entities: how tokens become words and words one entity (default: none)",
    )
    encoding.add_argument("--context", metavar="TEXT", help="questions: the text that holds the answer")
    encoding.add_argument(
        "--prompt-name", metavar="NAME", help="put a prompt of the folder before each text (its default one)"
    )
    encoding.add_argument("--prompt", metavar="TEXT", help="put this before each text; an empty one for none")
    encoding.add_argument(
        "--pairs",
        action="store_true",
        default=None,
        help='rerankers: each text is a pair, as a JSON list ["query", "document"] or with a TAB between',
    )
    encoding.add_argument("--query", metavar="TEXT", help="rerankers: sort the texts by their score with it")
    encoding.add_argument("--batch-size", type=int, metavar="N", help="texts fed at a time (default: 32)")


def run(args: argparse.Namespace) -> int:
    """Check what was asked for, read what is to be done, load the folder and do it."""
    from trimserve.encoder.encoder import Encoder
    from trimserve.folder.manifest import read_manifest
    from trimserve.loading import load

    task = read_manifest(args.folder).task
    check_options(args, task)  # before the model is loaded, as are the texts
    generates = task in GENERATOR_TASKS
    texts = list(_texts(args, by_line=not generates))
    corpus = None if args.corpus is None else read_texts(args.corpus, _given(args, READING))
    model = load(args.folder, device=args.device, threads=args.threads, memory=args.memory)
    if not isinstance(model, Encoder):
        return _generate(args, model, texts)
    from trimserve.cli.commands._encode import encode

    check_options(args, task, sparse=model.settings.is_sparse)
    options = [name for name in OPTIONS if name not in (*GENERATION, "forced_bos", "chat", *READING)]
    return encode(args, model, texts, _given(args, options), corpus)


def _texts(args: argparse.Namespace, *, by_line: bool) -> Iterator[str]:
    """The texts of the command line; stdin is one prompt, or a text a line."""
    words = args.texts or [STDIN]
    if [*words, args.corpus].count(STDIN) > 1:
        texts = "" if args.texts else " (without a TEXT the texts come from there, too)"
        raise UsageError(f"stdin (-) can be read only once: name it once{texts}.")
    for word in words:
        if word != STDIN:
            yield encodable_word(word)
        elif by_line:
            yield from read_stdin().removesuffix("\n").split("\n")
        else:
            yield read_stdin().removesuffix("\n")


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _generate(args: argparse.Namespace, model: "Generator", prompts: list[str]) -> int:
    options: GenerationOptions = _given(args, GENERATION)  # type: ignore[assignment]
    if args.forced_bos is not None:
        options["forced_bos_token_id"] = _token_id(model, args.forced_bos)
    plan = model.plan(options)
    check_plan(args, plan)
    start = time.perf_counter()
    if args.format == "human" and not args.report_mass and plan.beams is None:
        for prompt in prompts:
            _stream(model, prompt, args.chat, options)
        results: list[Generation] = []
    elif args.chat:
        results = [model.chat([_message(prompt)], **options) for prompt in prompts]
    else:
        results = model.generate(prompts, **options)
    seconds = time.perf_counter() - start
    if results:
        document = _document(model, prompts, results, options) | {"seconds": round(seconds, 6)}
        emit(args, document, "\n".join(_with_mass(result) for result in results))
    if args.verbose:
        print(_summary(model, seconds), file=sys.stderr)
    return 0


def _token_id(model: "Generator", token: str) -> int:
    token_id = model.codec.tokenizer.token_to_id(token)
    if token_id is None:
        raise UsageError(
            f"the tokenizer of {model.folder.path} has no token {token!r}: see its tokenizer.json."
        )
    return int(token_id)


def _stream(model: "Generator", prompt: str, chat: bool | None, options: "GenerationOptions") -> None:
    pieces = model.stream_chat([_message(prompt)], **options) if chat else model.stream(prompt, **options)
    out = data_stream()
    for piece in pieces:
        print(piece, end="", file=out, flush=True)
    print(file=out, flush=True)


def _message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _document(
    model: "Generator", prompts: list[str], results: "list[Generation]", options: "GenerationOptions"
) -> dict[str, Any]:
    stats = model.stats
    texts = [result.text for result in results]
    # As the pipelines of transformers give it: an encoder-decoder's output does not go on from its source.
    whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    document: dict[str, Any] = {
        "texts": texts,
        "generated_text": texts if model.folder.manifest.task == TEXT2TEXT_TASK else whole,
        "ids": [list(result.ids) for result in results],
        "stopped": [result.stopped for result in results],
        "mode": model.plan(options).mode,
        "tokens": stats.tokens,
        "prompt_tokens": stats.prompt_tokens,
        "drafted": stats.drafted,
        "rejected": stats.rejected,
        "cold_tokens": stats.cold_tokens,
    }
    if document["mode"] == "exact":
        document["cold_reads"] = _cold_reads(model)
    masses = [result.cold_mass for result in results]
    return document | ({"cold_mass": masses} if options.get("report_mass") else {})


def _cold_reads(model: "Generator") -> dict[str, Any]:
    """What the checks of exact mode read (docs/certificate.md)."""
    reads, tokens = model.stats.cold_reads, max(model.stats.tokens, 1)
    return {
        "steps": reads.steps,
        "certified_share": round(reads.certified / max(reads.steps, 1), 6),
        "rows": reads.rows,
        "bytes_per_token": round(reads.bytes / tokens),
    }


def _with_mass(result: "Generation") -> str:
    if result.cold_mass is None:
        return result.text
    return f"{result.text}\n[probability of tokens that compact mode cannot produce: {result.cold_mass:.4g}]"


def _summary(model: "Generator", seconds: float) -> str:
    stats = model.stats
    parts = ", ".join(f"{name} {spent:.2f} s" for name, spent in stats.seconds.items())
    return (
        f"{stats.tokens:,} tokens in {seconds:.2f} s ({parts}); {stats.drafted:,} drafted, "
        f"{stats.rejected:,} rejected, {stats.cold_tokens:,} cold"
    )
