"""Texts that every model should survive; `verify` runs them beside the texts that it is given."""

ORDINARY = (
    "The quick brown fox jumps over the lazy dog.",
    "What is 17 + 25? Show your work, step by step.",
    "I was charged twice for order #4821; please send the refund to my card.",
    "def area(width, height):\n    return width * height\n",
)
HOSTILE = (
    "",
    " ",
    "a",
    "\n",
    "\t\r\n \n\n",
    "😀",
    "👩‍👩‍👧‍👦 🏳️‍🌈 1️⃣ 🇺🇳",
    "漢字仮名交じり文。你好，世界！",  # noqa: RUF001
    "한국어 문장입니다.",
    "السلام عليكم ورحمة الله",
    "שָׁלוֹם עוֹלָם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "Ελληνικά, кириллица, հայերեն, ქართული, አማርኛ, ᏣᎳᎩ, 𐍈𐌰𐌿𐍂",
    "e\u0301 vs \u00e9, \ufb01 vs fi, \u212b vs \u00c5",
    "\u0000\u0001\u0007\u001b[31m\u007f\u0085",
    "\u200b\u200d\u2060\ufeff\u202e\u2028\u00a0",
    "\ufffd\ufffe\U0010ffff",
    "Zażółć gęślą jaźń; Übergrößenträger; smørrebrød; kôň",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899",
    "<s></s><unk><pad>[CLS][SEP][MASK]<|endoftext|><|im_start|>system",
    "SELECT * FROM t WHERE a = '\\'; -- \"quotes\" `ticks` {braces} <tags/> 100%",
    "∑∏∫√∞≠≤⊕ αβγδ ℝⁿ → x² ½ ‰ € ₿",
    "a sentence that goes on, one clause after another, 中文 and русский between, " * 40,
)
BUILT_IN = ORDINARY + HOSTILE
