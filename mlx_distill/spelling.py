"""The text of an answer, token by token, and what of it a terminal may be shown."""

from typing import Any

from mlx_distill.data.template import decode_answer

# Everything of Unicode's category Cc but newline and tab: a model may write escape sequences, which a
# terminal would obey.
_CONTROL = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)])
del _CONTROL[ord("\n")], _CONTROL[ord("\t")]


def printable(text: str) -> str:
    """The text without control characters; newlines and tabs stay."""
    return text.translate(_CONTROL)


class Speller:
    """Pieces of text as tokens come; joined, they are `decode_answer` of all of them.

    Where tokens of single bytes make no text, `decode_answer` gives up all of their run, and the pieces only
    the bytes that do not fit.

    mlx-lm's own detokenizers lose spaces: the one for byte-level BPE the first of an answer, the naive one
    the first of each line where the tokenizer strips one. tests/test_spelling.py shows both.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # the last ones that made a piece, and those that wait for more
        self._said = 0  # so many of them have been given as text
        self._known = ""  # the text of those
        self._opens = True  # no piece has been given yet

    def add(self, token: int) -> str:
        """The text that is complete with this token; "" where a character still lacks bytes."""
        self._tokens.append(token)
        text = self._text()
        if len(text) <= len(self._known) or text.endswith("\ufffd"):
            return ""
        piece = text[len(self._known) :]
        # The tokens of this piece stand before the next: some tokens read otherwise at the start of a text.
        self._tokens = self._tokens[self._said :]
        self._said = len(self._tokens)
        self._opens = False
        self._known = self._text()
        return piece

    def rest(self) -> str:
        """What waited for bytes that will not come."""
        return self._text()[len(self._known) :]

    def _text(self) -> str:
        if self._opens:
            return decode_answer(self._tokens, self._tokenizer)
        # The same, faster: behind other tokens no space is taken for that of a text's beginning.
        return self._tokenizer.decode(self._tokens, clean_up_tokenization_spaces=False)
