"""Whether tokenizers of one vocabulary split text alike: equal maps do not say that they do.

Merges, the splitting before them, normalisation and added tokens are not in a map from tokens to ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.data.rows import Row
from mlx_distill.speaker import common

ROWS = 16  # of the data, spread over it
CHARACTERS = 2000  # of each
TOLD = 4  # tokens from the first that differs

# What tokenizers disagree about. No text of a user's, so that a difference can be told to others.
TRICKY = (
    "a",
    " a",
    "  two spaces  before and behind  ",
    "\n\n\nthree newlines\n\n",
    "\tif x:\n\t\treturn {'a': [1, 2]}\n    # four spaces",
    "carriage\r\nreturn",
    "0 12 123 1234 12345678 3.14159 1,000,000 1e-5 2024-01-31",
    "I'm you'll THEY'VE don't",
    "def f(x: int) -> str:\n    return f\"{x!r}\" if x != 0 else '<none>'\n",
    "snake_case camelCase SCREAMING_CASE kebab-case /usr/bin/env --flag=value https://example.org/?q=1#top",
    "<b>bold</b> &amp; \\frac{a}{b} $x^2$ ~~~ ``` *** ___",
    "caf\u00e9 cafe\u0301 na\u00efve \u00dcber \u00df \u0130stanbul \ufb01",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \uc548\ub155\ud558\uc138\uc694",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947 "
    "\u041f\u0440\u0438\u0432\u0435\u0442",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \u2764\ufe0f \u2192 \u221e",
    "no\u00a0break zero\u200bwidth soft\u00adhyphen \u2018quotes\u2019 \u2013 \u2014 \u2026",
    "<|im_start|>user\n<|im_end|> <s> </s> [INST] <|endoftext|> <unk> <think>",
)


def split_differently(named: Mapping[str, Any], used: str, rows: Sequence[Row]) -> list[str]:
    """A line for each tokenizer that splits some text otherwise than the one that the run uses.

    Args:
        named: tokenizers of one vocabulary, by the key of the recipe that each comes from.
        used: the key of the run's.
        rows: of the data, of which some are encoded beside `TRICKY` and special tokens written as text.
    """
    lines, ours, data = [], named[used], _some(rows)
    for key, theirs in named.items():
        if theirs is ours:
            continue
        special = " ".join(sorted({*map(str, ours.all_special_tokens), *map(str, theirs.all_special_tokens)}))
        different = [text for text in (*data, *TRICKY, f"a {special} b") if _parts(text, ours, theirs)]
        if not different:
            continue
        rest, mine, its = _shown(different[0], ours, theirs)
        count = sum(text in different for text in data)
        learns = f"the student learns that of `{used}`" if key.startswith("student") else "it reads that one"
        lines.append(
            f"`{key}` has the vocabulary of `{used}`, but splits text in another way: it makes {its} of "
            f"{rest}, and `{used}` {mine}; {count} of {len(data)} rows differ, and {learns}"
        )
    return lines


def _some(rows: Sequence[Row]) -> list[str]:
    """The beginnings of rows spread over all of them."""
    chosen = [rows[i * len(rows) // ROWS] for i in range(ROWS)] if len(rows) > ROWS else rows
    texts = (row.text if row.text is not None else f"{row.question()}{row.answer() or ''}" for row in chosen)
    return [text[:CHARACTERS] for text in texts]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _parts(text: str, ours: Any, theirs: Any) -> bool:
    return _ids(ours, text) != _ids(theirs, text)


def _shown(text: str, ours: Any, theirs: Any) -> tuple[str, str, str]:
    """What follows the last token on which two readings of a text agree, and the next tokens of each."""
    mine, its = _ids(ours, text), _ids(theirs, text)
    at = common(mine, its)
    before = ours.decode(mine[:at], clean_up_tokenization_spaces=False)
    rest = text[len(before) :] if text.startswith(before) else text
    tokens = [one.convert_ids_to_tokens(ids[at : at + TOLD]) for one, ids in ((ours, mine), (theirs, its))]
    return repr(rest[:20]), str(tokens[0]), str(tokens[1])
