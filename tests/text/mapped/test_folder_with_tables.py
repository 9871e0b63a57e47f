"""A folder with tables gives what one without gives; tables of another tokenizer are refused."""

import hashlib
import random

import numpy as np
import pytest

from tests.support.folders import make_folder
from tests.support.odd_texts import odd_texts
from tests.support.tiny_tokenizers import KINDS, tokenizer_config
from trimserve.errors import MismatchError
from trimserve.folder.names import TOKENIZER_TABLES_NAME
from trimserve.text.codec import Codec
from trimserve.text.mapped.building import build_tables
from trimserve.text.mapped.tokenizer import MappedTokenizer
from trimserve.text.tokenizer import parse_tokenizer


@pytest.fixture(params=sorted(KINDS))
def folders(request, tmp_path):
    """The same folder without tables and with them."""
    source, tokenizer = tmp_path / "source", KINDS[request.param]()
    source.mkdir()
    content = tokenizer.to_str().encode()
    (source / "tokenizer.json").write_bytes(content)
    size = tokenizer_config(request.param, tokenizer)["vocab_size"]
    tables = tmp_path / "tables"
    build_tables(content, hashlib.sha256(content).hexdigest()).write(tables)
    kept = list(range(0, size, 2))
    return (
        make_folder(tmp_path / "plain", kept, size, source=source),
        make_folder(
            tmp_path / "mapped", kept, size, source=source, files={TOKENIZER_TABLES_NAME: tables.read_bytes()}
        ),
    )


def test_both_folders_encode_and_decode_alike(folders):
    plain, mapped = Codec(folders[0]), Codec(folders[1], mapped=True)
    assert isinstance(mapped.tokenizer, MappedTokenizer)
    library = parse_tokenizer((folders[0].path / "tokenizer.json").read_bytes())
    literals = [token.content for token in library.get_added_tokens_decoder().values()]
    texts = list(odd_texts(random.Random(1), sorted(library.get_vocab()), literals, 60))
    inputs = [*texts, *zip(texts[::2], texts[1::2], strict=True)]
    for limit in (None, 7):
        mapped.drop_pages()  # what is read comes again
        found = mapped.encode_typed(inputs, max_tokens=limit)
        for one, other in zip(found, plain.encode_typed(inputs, max_tokens=limit), strict=True):
            assert one.ids.dtype == other.ids.dtype == np.int32
            assert (one.ids.tolist(), one.type_ids.tolist(), one.truncated) == (
                other.ids.tolist(), other.type_ids.tolist(), other.truncated
            )  # fmt: skip
            assert mapped.decode(one.ids) == plain.decode(other.ids)
            streamed = mapped.stream()
            assert streamed.push(one.ids) + streamed.flush() == plain.decode(one.ids)
    assert mapped.special_ids == plain.special_ids
    with mapped.lent() as one, plain.lent() as other:
        assert [e.offsets for e in one.encode_batch(texts)] == [e.offsets for e in other.encode_batch(texts)]


def test_tables_of_another_tokenizer_are_refused(folders, tmp_path):
    content = (folders[0].path / "tokenizer.json").read_bytes()
    build_tables(content, "0" * 64).write(tmp_path / "other")
    folder = make_folder(
        tmp_path / "wrong",
        folders[0].vocab.kept_ids.tolist(),
        folders[0].vocab.vocab_size,
        source=tmp_path / "source",
        files={TOKENIZER_TABLES_NAME: (tmp_path / "other").read_bytes()},
    )
    with pytest.raises(MismatchError, match="belongs to 000000000000"):
        Codec(folder, mapped=True)
