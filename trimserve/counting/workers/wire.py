"""Jobs, slices and blocks as plain data for workers in other processes: JSON, and arrays as safetensors.

Reading a message runs no code, whoever wrote it.
"""

import json
import struct
from collections import Counter
from dataclasses import asdict
from typing import IO, Any, NamedTuple

from safetensors import numpy as safetensors

from trimserve import errors
from trimserve.corpus.documents import Reading
from trimserve.corpus.files import CorpusFile
from trimserve.corpus.slices import Slice
from trimserve.counting.encoding.encoders import IdEncoder
from trimserve.counting.slice_counts import SliceCounts
from trimserve.counting.workers.job import Job
from trimserve.text.chat import ChatTemplate

_LENGTHS = struct.Struct("<QQ")
_ARRAYS = ("counts", "document_counts", "output_counts", "open_ids")
_FACTS = ("texts", "characters", "skipped", "sha256")


class Message(NamedTuple):
    """What goes between two processes: a JSON text, and arrays as the content of a safetensors file."""

    text: str
    arrays: bytes = b""


def job_message(job: Job) -> Message:
    """A job to send."""
    return Message(json.dumps(asdict(job) | {"tokenizer_json": job.tokenizer_json.decode()}))


def read_job(message: Message) -> Job:
    """The job that was sent."""
    facts = json.loads(message.text)
    reading = facts.pop("reading")
    if (template := reading.pop("template")) is not None:
        template = ChatTemplate(**template)
    tokenizer_json = facts.pop("tokenizer_json").encode()
    return Job(**facts, tokenizer_json=tokenizer_json, reading=Reading(**reading, template=template))


def slice_message(piece: Slice) -> Message:
    """A slice to send."""
    return Message(json.dumps(asdict(piece)))


def read_slice(message: Message) -> Slice:
    """The slice that was sent."""
    facts = json.loads(message.text)
    return Slice(**facts | {"file": CorpusFile(**facts["file"])})


def answer(job: Job, piece: Slice, encoder: IdEncoder) -> Message:
    """Count a slice: the block to send, or the error that the other side shall raise."""
    try:
        block = job.count(piece, encoder)
    except errors.TrimserveError as error:
        return Message(json.dumps({"error": type(error).__name__, "told": [str(error)]}))
    except OSError as error:
        if error.errno is None:
            return Message(json.dumps({"error": "TrimserveError", "told": [f"{piece.file.name}: {error}."]}))
        return Message(
            json.dumps({"error": "OSError", "told": [error.errno, error.strerror, error.filename]})
        )
    arrays = {name: array for name in _ARRAYS if (array := getattr(block, name)) is not None}
    return Message(json.dumps({name: getattr(block, name) for name in _FACTS}), safetensors.save(arrays))


def read_block(message: Message) -> SliceCounts:
    """The block of an answer.

    Raises:
        TrimserveError: the slice could not be counted.
        OSError: its file could not be read.
    """
    facts: dict[str, Any] = json.loads(message.text)
    if "error" in facts:
        known = getattr(errors, facts["error"], OSError)
        raise known(*facts["told"])
    facts["skipped"] = Counter(facts["skipped"])
    return SliceCounts(**facts | safetensors.load(message.arrays))


def send(stream: IO[bytes], message: Message) -> None:
    """Write a message."""
    text = message.text.encode()
    stream.write(_LENGTHS.pack(len(text), len(message.arrays)))
    stream.write(text)
    stream.write(message.arrays)
    stream.flush()


def receive(stream: IO[bytes]) -> Message:
    """Read a message.

    Raises:
        EOFError: the other side has ended.
    """
    text, arrays = _LENGTHS.unpack(_read(stream, _LENGTHS.size))
    return Message(_read(stream, text).decode(), _read(stream, arrays))


def _read(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) != size:
        raise EOFError
    return content
