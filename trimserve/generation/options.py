"""What `Generator.generate` accepts: its options, and the modes exact and compact."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypedDict

from msgspec import Meta

from trimserve.arguments import Count, Share
from trimserve.decoding.beam import EarlyStopping
from trimserve.decoding.columns import LogitsProcessor

Mode = Literal["exact", "compact"]
MODES: tuple[Mode, ...] = ("exact", "compact")
# Ranges of options; each holds wherever the number is used, so that no logit overflows in float32.
Zero = Annotated[int, Meta(ge=0)]
# Of 0 (greedy), or one that a logit can be divided by: see `plan`.
Temperature = Annotated[float, Meta(ge=0, le=1e6)]
Mass = Annotated[float, Meta(gt=0, le=1)]
Cutoff = Annotated[float, Meta(ge=0, lt=1)]
Penalty = Annotated[float, Meta(ge=1e-6, le=1e6)]
Bias = Annotated[float, Meta(ge=-1e9, le=1e9)]
Seed = Annotated[int, Meta(ge=0, lt=2**64)]
StopText = Annotated[str, Meta(min_length=1)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
TokenIds = Annotated[Sequence[TokenId], Meta(min_length=1)]


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of `Generator.generate` and `Generator.stream`.

    Each is checked against its annotation before anything else happens. What is left out, or None, is as
    the folder's generation_config.json has it, as `generate()` of transformers takes it (docs/runtime.md has
    the list): the options from `do_sample` to `stop_strings` have its names and meanings. A `temperature` of
    0 is greedy, another one samples. `max_new_tokens` limits the output, `max_length` prompt and output (128
    new tokens where neither the folder nor the call says it); `max_new_tokens` cannot be None, which is no
    limit for some libraries and their default for others. `stop` are strings that end the text and are not
    part of it; `stop_strings` too, and these may be special tokens. `forced_bos_token_id` is the language of
    mBART-50, M2M100 and NLLB. `num_beams` above 1 searches with so many beams; `length_penalty` and
    `early_stopping` are those of `BeamParams`.

    Of trimserve alone: `mode` is "exact" (default where the folder has cold rows) or "compact";
    `certify=False` leaves the sketch of the cold rows unused, which changes no token (docs/certificate.md);
    `text_drafts=True` feeds several tokens a step where a text repeats itself and that pays, as summaries and
    edits do (docs/exact-mode.md); `max_block` limits how many tokens are drafted before a check;
    `report_mass` measures, in compact mode, the probability of what it cannot produce; penalties by count,
    `logit_bias`, `logits_processor` and `seed` are those of `SamplingParams`.
    """

    max_new_tokens: Count
    stop: StopText | Sequence[StopText] | None
    mode: Mode | None
    certify: bool
    text_drafts: bool
    max_block: Count
    report_mass: bool
    presence_penalty: Bias | None
    frequency_penalty: Bias | None
    logit_bias: Mapping[TokenId, Bias] | None
    logits_processor: LogitsProcessor | None
    seed: Seed | None
    do_sample: bool | None
    temperature: Temperature | None
    top_k: Zero | None
    top_p: Mass | None
    min_p: Share | None
    top_h: Mass | None
    typical_p: Mass | None
    epsilon_cutoff: Cutoff | None
    eta_cutoff: Cutoff | None
    repetition_penalty: Penalty | None
    encoder_repetition_penalty: Penalty | None
    no_repeat_ngram_size: Zero | None
    encoder_no_repeat_ngram_size: Zero | None
    bad_words_ids: Sequence[TokenIds] | None
    sequence_bias: Mapping[tuple[TokenId, ...], Bias] | Sequence[tuple[TokenIds, Bias]] | None
    suppress_tokens: Sequence[TokenId] | None
    begin_suppress_tokens: Sequence[TokenId] | None
    forced_bos_token_id: TokenId | Sequence[TokenId] | None
    forced_eos_token_id: TokenId | Sequence[TokenId] | None
    exponential_decay_length_penalty: tuple[Zero, Penalty] | tuple[()] | None
    remove_invalid_values: bool | None
    renormalize_logits: bool | None
    max_length: Count | None
    min_length: Zero | None
    min_new_tokens: Zero | None
    eos_token_id: TokenId | Sequence[TokenId] | None
    bos_token_id: TokenId | None
    decoder_start_token_id: TokenId | None
    num_beams: Annotated[int, Meta(ge=1, le=1024)] | None
    length_penalty: Annotated[float, Meta(ge=-1e3, le=1e3)] | None
    early_stopping: EarlyStopping | None
    stop_strings: StopText | Sequence[StopText] | None
