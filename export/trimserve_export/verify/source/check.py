"""The check `source`: what the original folder gives in its own library is what the trimmed folder gives.

Every other check compares one of our exports with another. This one loads the original in transformers or
sentence-transformers, in fp32, and compares ids, numbers and generated ids on the runtime's public API.
"""

from collections.abc import Callable, Iterator

from trimserve.errors import TrimserveError
from trimserve.folder.tasks import GENERATOR_TASKS
from trimserve_export.verify.context import Context
from trimserve_export.verify.result import Check
from trimserve_export.verify.source.encoders import compare_embeddings, compare_outputs, compare_pairs
from trimserve_export.verify.source.generators import compare_generated, compare_logits
from trimserve_export.verify.source.lengths import compare_lengths
from trimserve_export.verify.source.original import Original
from trimserve_export.verify.source.rounded import measure
from trimserve_export.verify.source.sides import Differs, Part, Sides, shortened

NAME = "source"


def check_source(context: Context) -> Check:
    """Compare the folder with the original in its own library; docs/verify.md says within which bounds."""
    if context.source.graph is not None:
        return Check(NAME, None, None, "not comparable: no checkpoint (the source is an ONNX graph)")
    folder = context.source.composite or context.source.root
    sides = Sides(context, Original(folder, context.folder.manifest.task))
    library, parts = sides.original.library, []
    for compare in _comparisons(sides):
        try:
            parts.append(compare(sides))
        except Differs as found:
            return Check(NAME, False, found.largest, f"{library} in fp32 gives another result: {found}")
        except TrimserveError:
            raise
        except Exception as error:  # a library may raise anything on a model that it cannot run
            reason = str(error).strip().partition("\n")[0]
            return Check(
                NAME, False, None, f"{library} cannot be compared with: {type(error).__name__}: {reason}"
            )
    numbers = [part.largest for part in parts if part.largest is not None]
    notes = "; ".join(part.note for part in parts)
    outcome = True if any(part.made for part in parts) else None
    return Check(NAME, outcome, max(numbers, default=None), f"as {library} in fp32: {notes}")


def _comparisons(sides: Sides) -> Iterator[Callable[[Sides], Part]]:
    manifest, original = sides.context.folder.manifest, sides.original
    if sides.is_runtime and original.has_tokenizer:
        yield _compare_ids
    if manifest.quantization is not None or manifest.dtype != "fp32":
        yield measure
        return
    if not sides.is_runtime or manifest.task in GENERATOR_TASKS:
        yield compare_logits
    elif original.is_sentence_encoder:
        yield compare_embeddings
    else:
        yield compare_outputs
        if original.sentence_kind == "CrossEncoder":
            yield compare_pairs
    yield compare_lengths
    if sides.is_runtime and manifest.task in GENERATOR_TASKS:
        yield compare_generated


def _compare_ids(sides: Sides) -> Part:
    """Token ids of every text: AutoTokenizer's, special tokens included."""
    texts, rows = sides.context.texts, sides.context.folder.vocab.vocab_size
    for text in texts:
        expected, found = sides.original.token_ids(text), sides.context.encode(text)
        if found is None:  # an id that the model has no row for
            if max(expected, default=0) < rows:
                raise Differs(f"{text[:40]!r} has the token ids {shortened(expected)}, and none here")
        elif found.tolist() != expected:
            wrong = shortened(found.tolist())
            raise Differs(f"the token ids of {text[:40]!r} are {shortened(expected)}, found {wrong}")
    return Part(f"token ids of {len(texts)} texts equal")
