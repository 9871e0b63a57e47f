import pytest

from trimserve.model.resolve import resolve_model
from trimserve.text.names import TokenNames, kind_of


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("cat", "Latin"),
        ("straße", "Latin, accented"),
        ("кот", "Cyrillic"),
        ("日本", "Han"),
        ("日本の", "Kana"),
        ("한국", "Hangul"),
        ("سلام", "Arabic"),
        ("a猫", "several scripts"),
        ("\uff46\uff55", "Latin, accented"),  # full width
        ("42", "digits"),
        ("½", "digits"),
        ("snake_case", "code"),
        ("camelCase", "code"),
        ("->", "code"),
        ("don't", "Latin"),
        (".", "punctuation"),
        ("。", "punctuation"),
        ("😀", "symbols, emoji"),
        ("µ", "symbols, emoji"),
        ("\n\t", "whitespace"),
        ("", "whitespace"),
    ],
)
def test_kinds(text, kind):
    assert kind_of(text) == kind


def test_texts_of_every_family(model_folders):
    names = {kind: TokenNames(resolve_model(folder).tokenizer()) for kind, folder in model_folders.items()}
    ids = {kind: resolve_model(folder).tokenizer().token_to_id for kind, folder in model_folders.items()}
    cases = [
        ("byte_level_bpe", "Ġthe", " the", "Latin"),
        ("byte_level_bpe", "Ċ", "\n", "whitespace"),
        ("byte_level_bpe", "ã", "<E3>", "bytes"),
        ("byte_level_bpe", "<|turn|>", "<|turn|>", "special"),
        ("byte_level_bpe", "<think>", "<think>", "special"),
        ("sentencepiece_bpe", "▁the", " the", "Latin"),
        ("sentencepiece_bpe", "<0x0A>", "\n", "bytes"),
        ("wordpiece", "##og", "##og", "Latin"),
        ("unigram", "▁cat", " cat", "Latin"),
    ]
    for family, token, text, kind in cases:
        id_ = ids[family](token)
        assert (names[family].text(id_), names[family].kind(id_)) == (text, kind), token
    assert names["byte_level_bpe"].text(326) == "#326"
    assert names["byte_level_bpe"].kind(326) == "no token"
