"""What an answer says that its source does not: a proxy, by names and numbers.

A model that makes things up mostly makes up names and numbers, and those can be looked for. A fact is

- a number: thousands separators (comma, apostrophe, narrow space) and zeros behind the point do not
  matter, so 1,000 = 1000 and 3.50 = 3.5; `5 %`, `5%` and `5 percent` are one number, and another than 5;
- a name: a word of two letters or more with a capital letter, unless the capital is only that of a
  sentence's first word. So BERT, FearNet and CIFAR count anywhere, Paris within a sentence.

Words end where letters do: `CIFAR-10` and `CIFAR10` are both a name and a number. A name is in the source if
its word is there, in any case, with or without an s at its end, or if, of three capitals or more, the words
that it abbreviates follow each other there (GAN, GANs: generative adversarial networks). A number is there if
it is, or, up to twelve, its English word.

It is a proxy and no more. It sees neither what is said of a name nor a wrong verb, it takes every German
noun for a name, and in a script without capitals it finds numbers only. What is common knowledge and not
in the source counts as made up.
"""

import re
import unicodedata
from typing import NamedTuple

_SEPARATOR = re.compile(r"(?<=\d)[,'’\u00a0\u2009\u202f](?=\d{3}(?!\d))")
_PART = re.compile(
    r"(?P<number>\d+(?:\.\d+)?|(?<![\w.])\.\d+)(?P<percent>\s?(?:%|per\s?cent\b))?|(?P<word>[^\W\d_]+)",
    re.IGNORECASE,
)
_ENDS_SENTENCE = re.compile(r"[.!?:;…\n]")
_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
_COUNTED = {word: str(number) for number, word in enumerate(_WORDS)}


class Facts(NamedTuple):
    """What a text states that can be looked for elsewhere."""

    numbers: frozenset[str]  # "1000", "3.5", "5%"
    names: frozenset[str]  # as they are written


def unfaithful(answer: str, source: str) -> float | None:
    """The share of an answer's facts that are not in its source, 0 to 1, each fact counted once.

    None: the answer has neither a name nor a number, and nothing can be said of it.
    """
    found = facts(answer)
    total = len(found.numbers) + len(found.names)
    return len(made_up(found, source)) / total if total else None


def facts(text: str) -> Facts:
    """The numbers and names of a text."""
    numbers, names, last = set[str](), set[str](), None
    text = _plain(text)
    for part in _PART.finditer(text):
        if part["number"]:
            numbers.add(_number(part))
        elif len(part["word"]) > 1:
            begins = last is None or _ENDS_SENTENCE.search(text, last, part.start())
            if any(map(str.isupper, part["word"][1 if begins else 0 :])):
                names.add(part["word"])
        last = part.end()
    return Facts(frozenset(numbers), frozenset(names))


def made_up(found: Facts, source: str) -> list[str]:
    """Those facts that are not in the source, numbers first, in alphabetical order."""
    parts = list(_PART.finditer(_plain(source)))
    numbers = {_number(part) for part in parts if part["number"]}
    numbers |= {number.removesuffix("%") for number in numbers}
    words = [part["word"].casefold() for part in parts if part["word"]]
    numbers |= {_COUNTED[word] for word in words if word in _COUNTED}
    initials, known = "".join(word[0] for word in words), {word.removesuffix("s") for word in words}

    def is_there(name: str) -> bool:
        word, capitals = name.casefold().removesuffix("s"), name.removesuffix("s")
        short = len(capitals) > 2 and capitals.isupper()
        return word in known or (short and word in initials)

    return [
        *sorted(found.numbers - numbers),
        *sorted(name for name in found.names if not is_there(name)),
    ]


def _plain(text: str) -> str:
    """Compatible forms of letters and digits as one, thousands separators gone."""
    return unicodedata.normalize("NFKC", _SEPARATOR.sub("", text))


def _number(part: re.Match[str]) -> str:
    whole, _, rest = part["number"].partition(".")
    rest = rest.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{rest}" if rest else "") + ("%" if part["percent"] else "")
