"""What `Generator.generate` accepts: its options, and the modes exact and compact."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from trimserve.decoding.beam import EarlyStopping
from trimserve.decoding.columns import LogitsProcessor

Mode = Literal["exact", "compact"]
MODES: tuple[Mode, ...] = ("exact", "compact")


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of `Generator.generate` and `Generator.stream`.

    What is left out, or None, is as the folder's generation_config.json has it, as `generate()` of
    transformers takes it (docs/runtime.md has the list): the options from `do_sample` to `stop_strings` have
    its names and meanings. A `temperature` of 0 is greedy, another one samples. `max_new_tokens` limits the
    output, `max_length` prompt and output (128 new tokens where neither the folder nor the call says it);
    `stop` are strings that end the text and are not part of it; `stop_strings` too, and these may be special
    tokens. `forced_bos_token_id` is the language of mBART-50, M2M100 and NLLB. `num_beams` above 1 searches
    with so many beams; `length_penalty` and `early_stopping` are those of `BeamParams`.

    Of trimserve alone: `mode` is "exact" (default where the folder has cold rows) or "compact";
    `certify=False` leaves the sketch of the cold rows unused, which changes no token (docs/certificate.md);
    `max_block` limits how many tokens are drafted before a check; `report_mass` measures, in compact mode,
    the probability of what it cannot produce; penalties by count, `logit_bias`, `logits_processor` and `seed`
    are those of `SamplingParams`.
    """

    max_new_tokens: int | None
    stop: str | Sequence[str] | None
    mode: Mode | None
    certify: bool
    max_block: int
    report_mass: bool
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    logits_processor: LogitsProcessor | None
    seed: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    top_h: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float | None
    encoder_repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[tuple[Sequence[int], float]] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    forced_bos_token_id: int | Sequence[int] | None
    forced_eos_token_id: int | Sequence[int] | None
    exponential_decay_length_penalty: tuple[int, float] | None
    remove_invalid_values: bool | None
    renormalize_logits: bool | None
    max_length: int | None
    min_length: int | None
    min_new_tokens: int | None
    eos_token_id: int | Sequence[int] | None
    bos_token_id: int | None
    decoder_start_token_id: int | None
    num_beams: int | None
    length_penalty: float | None
    early_stopping: EarlyStopping | None
    stop_strings: str | Sequence[str] | None
