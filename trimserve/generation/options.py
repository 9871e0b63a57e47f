"""What `Generator.generate` accepts: its options, and the modes exact and compact."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from trimserve.decoding.beam import BeamParams, EarlyStopping
from trimserve.decoding.columns import LogitsProcessor
from trimserve.errors import UsageError

Mode = Literal["exact", "compact"]
MODES: tuple[Mode, ...] = ("exact", "compact")


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of `Generator.generate` and `Generator.stream`.

    The sampling options are those of `SamplingParams`. `max_new_tokens` limits the output (default 128);
    `stop` are strings that end it and are not part of it; `mode` is "exact" (default where the folder has
    cold rows) or "compact"; `certify=False` leaves the sketch of the cold rows unused, which changes no
    token (docs/certificate.md); `max_block` limits how many tokens are drafted before a check; `report_mass`
    measures, in compact mode, the probability of what it cannot produce. `forced_bos_token_id` (the language
    of mBART-50, M2M100 and NLLB) and `decoder_start_token_id` override the model's generation config.
    `num_beams` above 1 searches with so many beams instead of sampling; `length_penalty` and
    `early_stopping` are those of `BeamParams`.
    """

    max_new_tokens: int
    stop: Sequence[str]
    mode: Mode | None
    certify: bool
    max_block: int
    report_mass: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    logits_processor: LogitsProcessor | None
    seed: int
    forced_bos_token_id: int
    decoder_start_token_id: int
    num_beams: int
    length_penalty: float
    early_stopping: EarlyStopping


def beam_params(options: GenerationOptions) -> BeamParams | None:
    """How beams are kept, or None without them."""
    names = BeamParams.__dataclass_fields__
    given: dict[str, Any] = {name: value for name, value in options.items() if name in names}
    params = BeamParams(**given)
    if params.num_beams == 1:
        return None
    for name in ("temperature", "stop", "report_mass"):
        if options.get(name):
            raise UsageError(f"{name} means nothing to a beam search: leave it out, or use num_beams=1.")
    return params
