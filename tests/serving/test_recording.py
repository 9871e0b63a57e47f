"""The live profile: counts of token ids that add up, and nothing that few requests hold."""

import asyncio

import numpy as np
import pytest

from tests.support.folders import make_folder
from trimserve.errors import MismatchError, UsageError
from trimserve.profiles.profile import Profile
from trimserve.serving.recording import Recorder, check_recording
from trimserve.text.codec import Codec

V = 400


@pytest.fixture(scope="module")
def codec(model_folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("live")
    folder = make_folder(path, range(0, V, 2), V, source=model_folders["byte_level_bpe"])
    return Codec(folder)


def recorder(path, codec, min_docs=1):
    made = Recorder(path, min_docs)
    made.begin(codec._folder, codec)
    return made


def test_counts_of_prompts_and_answers(codec, tmp_path):
    live = recorder(tmp_path / "p", codec)
    live.add(np.array([1, 1, 2], np.int32), [3])
    live.add(np.array([2], np.int32), [3, 3])
    asyncio.run(live.save())
    found = Profile.load(tmp_path / "p")
    assert {id_: int(found.counts[id_]) for id_ in np.flatnonzero(found.counts)} == {1: 2, 2: 2, 3: 3}
    assert {id_: int(found.output_counts[id_]) for id_ in np.flatnonzero(found.output_counts)} == {3: 3}
    assert found.document_counts[[1, 2, 3]].tolist() == [1, 2, 2]
    assert found.texts == 2
    assert found.tokenizer_sha256 == codec._folder.manifest.tokenizer_sha256


def test_what_few_requests_hold_is_not_written(codec, tmp_path):
    live = recorder(tmp_path / "p", codec, min_docs=2)
    live.add(np.array([7, 8], np.int32))
    asyncio.run(live.save())
    assert not (tmp_path / "p").exists()
    live.add(np.array([8, 9], np.int32))
    asyncio.run(live.save())
    assert np.flatnonzero(Profile.load(tmp_path / "p").counts).tolist() == [8]


def test_another_run_adds_to_the_file(codec, tmp_path):
    for _ in range(2):
        live = recorder(tmp_path / "p", codec)
        live.add(np.array([5], np.int32))
        asyncio.run(live.save())
        asyncio.run(live.save())  # nothing new: nothing is added
    found = Profile.load(tmp_path / "p")
    assert (int(found.counts[5]), found.texts) == (2, 2)


def test_a_profile_of_another_model_is_refused(codec, model_folders, tmp_path):
    live = recorder(tmp_path / "p", codec)
    live.add(np.array([5], np.int32))
    asyncio.run(live.save())
    other = make_folder(tmp_path / "o", range(0, V, 2), V, source=model_folders["wordpiece"])
    with pytest.raises(MismatchError, match="different tokenizers"):
        Recorder(tmp_path / "p", 1).begin(other, Codec(other))


def test_one_file_is_for_one_model(tmp_path):
    check_recording(tmp_path, 1)
    check_recording(None, 2)
    with pytest.raises(UsageError, match="--record-profile"):
        check_recording(tmp_path, 2)
