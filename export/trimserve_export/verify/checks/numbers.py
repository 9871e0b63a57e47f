"""Checks of numbers: the trimmed graph against the full one on the same token ids."""

import platform

import numpy as np

from trimserve.arrays import Ids
from trimserve.encoder.encoder import Encoder
from trimserve.encoder.graph import SPANS
from trimserve.loading import load
from trimserve_export.verify.context import Context
from trimserve_export.verify.result import Check
from trimserve_export.verify.sweep import Differences, unchanged_outputs

_SLOT_SEQUENCES, _SLOT_TOKENS = 4, 32
_RUNTIME_TEXTS = 100
# What `Encoder.forward` gives, in the order in which it looks for them.
_RESULTS = ("last_hidden_state", "sentence_embedding", "logits")


def check_hidden_states(context: Context) -> Check:
    """Compare every output but vocab logits, bit for bit, on every text."""
    return check_differences("hidden-states", context.sweep.others, f"outputs on {_texts(context)}")


def check_kept_logits(context: Context) -> Check:
    """Compare the compact logits with the full ones at the kept ids, on every text and position.

    Bit for bit; only where a kernel adds the same products up in another order, because V columns end in
    another tail than K, is a difference within the rounding bound of both results accepted, and said.
    """
    kept = len(context.folder.vocab.head)
    return check_differences(
        "kept-logits", context.sweep.logits, f"logits of {kept:,} kept ids on {_texts(context)}"
    )


def check_runtime_outputs(context: Context) -> Check:
    """Compare what the runtime gives for each text by itself with the full graph's output."""
    model = load(context.folder.path)
    if not isinstance(model, Encoder):
        return Check("runtime-outputs", False, None, f"{context.folder.path} does not load as an encoder")
    kept, differences = context.folder.vocab.kept_ids, Differences()
    for text in context.texts[:_RUNTIME_TEXTS]:
        ids = context.encode(text)
        if ids is None or not context.trimmed.can_feed(ids):
            continue
        (ids,) = model.token_ids([text])  # as they are fed: cut to the longest input
        if not 0 < len(ids) <= context.max_tokens:
            continue
        outputs = context.full.run(ids)
        full = next((outputs[name] for name in _RESULTS if name in outputs), None)
        if full is None and all(name in outputs for name in SPANS):
            full = np.stack([outputs[name] for name in SPANS], axis=-1)
        if full is None:
            return Check(
                "runtime-outputs", False, None, "the full graph has no output that the runtime gives"
            )
        if context.full.has_vocab_head:
            bound = context.bound.of(outputs["hidden_states"])
            differences.add(full[0][..., kept], model.forward([text])[0], bound)
        else:
            differences.add(full[0], model.forward([text])[0])
    return check_differences("runtime-outputs", differences, "what the runtime gives for each text by itself")


def check_cold_slots(context: Context) -> Check:
    """Compare all outputs on sequences of cold ids, mixed with kept ones and repeated."""
    differences = Differences()
    sequences = _cold_sequences(context)
    names = unchanged_outputs(context.full)
    for ids in sequences:
        full, trimmed = context.full.run(ids), context.trimmed.run(ids)
        for name in names:
            differences.add(full[name], trimmed[name])
    tokens = sum(len(ids) for ids in sequences)
    return check_differences(
        "cold-slots", differences, f"outputs on {tokens} tokens, most of them through cold slots"
    )


def _cold_sequences(context: Context) -> list[Ids]:
    """Sequences of which three in four tokens are cold, drawn with a fixed seed."""
    random = np.random.default_rng(0)
    vocab, length = context.folder.vocab, min(_SLOT_TOKENS, context.max_tokens)
    sequences = []
    for _ in range(_SLOT_SEQUENCES):
        cold = random.choice(vocab.cold_ids, length)
        kept = random.choice(vocab.kept_ids, length)
        sequences.append(np.where(random.random(length) < 0.75, cold, kept).astype(np.int32))
        sequences[-1][-1] = sequences[-1][0]  # at least one id comes twice
    return sequences


def _texts(context: Context) -> str:
    used, given = len(context.token_ids), len(context.texts)
    return f"{used} texts" if used == given else f"{used} of {given} texts (the others have no ids to feed)"


def check_differences(name: str, differences: Differences, what: str) -> Check:
    """Turn what a comparison has seen into a check.

    Args:
        name: of the check.
        differences: what was seen.
        what: what was compared.
    """
    ok = differences.values > 0 and differences.beyond_bound == 0
    here = where_it_holds(differences)
    if differences.unequal == 0 and ok:
        return Check(name, True, 0.0, f"{differences.values:,} numbers bit for bit equal{here}: {what}")
    within = " within the rounding bound 2 gamma ||h|| max||w||" if ok else ""
    detail = f"{differences.unequal:,} of {differences.values:,} numbers differ{within}{here}: {what}"
    return Check(name, ok, differences.max_abs_diff, detail)


def where_it_holds(differences: Differences) -> str:
    """For a message: what was seen of sums that another processor may add up in another order."""
    if not differences.of_one_processor:
        return ""
    return f" on this {platform.machine()} processor (another may differ by the rounding of logits)"
