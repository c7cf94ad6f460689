"""Words, as the filters count them.

A word is a run of letters, digits, their accents and underscores. Any other sign is a word of its own, and
so is each Chinese or Japanese character, since no spaces part words there. White space parts words, and
how much of it there is, and of which kind, makes no difference.
"""

import unicodedata
from collections.abc import Iterator, Sequence

from mlx_distill.data.rows import Row

_WITHOUT_SPACES = (
    (0x3040, 0x30FF),  # hiragana, katakana
    (0x3400, 0x4DBF),  # Chinese characters, extension A
    (0x4E00, 0x9FFF),  # Chinese characters
    (0xF900, 0xFAFF),  # and their compatibility forms
    (0x20000, 0x3FFFF),  # and rare ones
)


class _Parted(dict[int, str]):
    """Character -> itself, with spaces around it where it is a word, by `str.translate`; filled as needed."""

    def __init__(self, signs: bool):
        super().__init__()
        self.signs = signs

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        if category[0] in "LMN" or char == "_":
            alone = any(first <= code <= last for first, last in _WITHOUT_SPACES)
            self[code] = f" {char} " if alone else char
        elif category[0] in "PS":
            self[code] = f" {char} " if self.signs else " "
        else:  # soft hyphens and joiners stand inside words; the rest are spaces and controls
            self[code] = "" if category == "Cf" else " "
        return self[code]


_WITH_SIGNS, _WITHOUT_SIGNS = _Parted(True), _Parted(False)


def words_and_signs(text: str) -> list[str]:
    """The words of a text, signs included, in order, as they are written."""
    return unicodedata.normalize("NFC", text).translate(_WITH_SIGNS).split()


def plain_words(text: str) -> list[str]:
    """The words of a text, in order: lower case, signs left out."""
    return unicodedata.normalize("NFC", text).casefold().translate(_WITHOUT_SIGNS).split()


def ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every n words that follow each other, in order."""
    return zip(*(words[i:] for i in range(n)), strict=False)


def asked(row: Row) -> list[str]:
    """What a row asks: its prompt, or the messages before the answer.

    A system message is left out: it stands before many rows, and says nothing of any one of them.
    """
    if row.messages is None:
        return [row.question()]
    *before, last = row.messages
    if last["role"] != "assistant":
        before.append(last)
    return [str(message.get("content") or "") for message in before if message["role"] != "system"]
