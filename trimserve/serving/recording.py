"""The live profile: counts of the token ids that a server is asked and answers, never a text."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Ids
from trimserve.errors import UsageError
from trimserve.folder.opening import TrimmedFolder
from trimserve.profiles.merging import add_up, check_same_model
from trimserve.profiles.profile import Profile
from trimserve.text.codec import Codec
from trimserve.vocab.map import Reason

_log = logging.getLogger(__name__)


class Recorder:
    """Counts what is served of one model and adds it to a profile's file; belongs to one event loop.

    An id is written once `min_docs` requests held it: what fewer hold, such as a name, leaves no trace in the
    file.
    """

    def __init__(self, path: Path, min_docs: int) -> None:
        """Count for a file, which may hold a profile already.

        Raises:
            MismatchError: it is no profile.
        """
        self._path = path
        self._min_docs = min_docs
        self._before = Profile.load(path) if path.exists() else None
        self._empty: Profile | None = None
        self._requests = 0
        self._changed = False

    def begin(self, folder: TrimmedFolder, codec: Codec) -> None:
        """Count for the model of a folder; what was counted stays, where it is of the same tokenizer.

        Raises:
            MismatchError: the file's profile is of another model.
        """
        empty = _empty_profile(folder, codec)
        for other in (self._before, self._empty):
            if other is not None:
                check_same_model(other, empty)
        if self._empty is None:
            size = empty.vocab_size
            self._counts, self._outputs, self._documents = (np.zeros(size, np.int64) for _ in range(3))
        self._empty = empty

    def add(self, prompt: Ids, output: Sequence[int] = ()) -> None:
        """Count one request: token ids that were read, and those that were produced."""
        if self._empty is None:
            return
        size = self._empty.vocab_size
        produced = np.bincount(np.asarray(output, np.int64), minlength=size)
        both = np.bincount(prompt, minlength=size) + produced
        self._counts += both
        self._outputs += produced
        self._documents += both > 0
        self._requests += 1
        self._changed = True

    def profile(self) -> Profile | None:
        """What may be written: the file's profile and what was counted since; None where there is nothing."""
        if self._empty is None or not self._requests:
            return self._before
        often = self._documents >= self._min_docs
        live = _filled(self._empty, self._counts, self._outputs, self._documents, often, self._requests)
        return live if self._before is None else add_up([self._before, live])

    async def save(self) -> None:
        """Write the file, whole or not at all, if anything was counted since it was written.

        Raises:
            OSError: it cannot be written; what was counted stays to be written.
        """
        if not self._changed:
            return
        found = self.profile()  # at one moment: the file is written while more is counted
        self._changed = False
        if found is None or not found.tokens:
            return
        try:
            await asyncio.to_thread(found.save, self._path)
        except BaseException:
            self._changed = True
            raise
        _log.info("%s counts %s tokens", self._path, f"{found.tokens:,}")


def _filled(
    empty: Profile,
    counts: npt.NDArray[np.int64],
    outputs: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int64],
    often: npt.NDArray[np.bool_],
    texts: int,
) -> Profile:
    """A profile of those ids that many requests hold."""
    return Profile(
        counts=np.where(often, counts, 0),
        output_counts=np.where(often, outputs, 0),
        document_counts=np.where(often, documents, 0),
        tokenizer_sha256=empty.tokenizer_sha256,
        tokenizer_name=empty.tokenizer_name,
        texts=texts,
        characters=0,
        beyond_rows=0,
        sources=(),
        structural=empty.structural,
        padding_ids=empty.padding_ids,
    )


def _empty_profile(folder: TrimmedFolder, codec: Codec) -> Profile:
    vocab = folder.vocab
    named = np.fromiter(codec.tokenizer.get_vocab(with_added_tokens=True).values(), np.int64)
    ids = np.arange(vocab.vocab_size, dtype=np.int32)
    return Profile(
        counts=np.zeros(vocab.vocab_size, np.int64),
        tokenizer_sha256=folder.manifest.tokenizer_sha256,
        tokenizer_name=folder.manifest.source.name,
        texts=0,
        characters=0,
        beyond_rows=0,
        sources=(),
        structural=vocab.kept_ids[vocab.reason == Reason.STRUCTURAL],
        padding_ids=ids[~np.isin(ids, named)],
    )


def check_recording(path: Path | None, folders: int) -> None:
    """Refuse a file for what cannot share one.

    Raises:
        UsageError: it is asked for and there are several models.
    """
    if path is not None and folders != 1:
        raise UsageError(
            "--record-profile counts one model's ids, and several folders are served: serve them apart."
        )
