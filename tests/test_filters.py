"""Filters: each on both sides of its limit, their order, and what they leave alone."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError, MissingExtra
from mlx_distill.filters import FILTERS, Material, keep, reasons, remembered, summary
from mlx_distill.filters.decontamination import ngrams_of
from mlx_distill.filters.programs import why_no_python
from mlx_distill.filters.repetition import repeated_share
from mlx_distill.filters.words import asked, plain_words, words_and_signs
from mlx_distill.options import Filters, Reasoning
from mlx_distill.written import Written

MARKS = Reasoning()
DOUBLE = Row(prompt='def solve(x):\n    """Double x."""\n', tests=("assert solve(2) == 4",), task="code")
PLAIN = Row(prompt="How many?")


def answers(*texts: str, row: Row = PLAIN, **fields: Any) -> list[Written]:
    """An answer each, to prompts of their own."""
    return [
        Written(i, 0, row, text, **{"tokens": list(range(len(text.split()))), "finished": True} | fields)
        for i, text in enumerate(texts)
    ]


def sift(written: Sequence[Written], material: Material | None = None, **options: Any) -> list[str | None]:
    return reasons(written, Filters(**options), material or Material())


def test_filters_that_are_off_do_nothing() -> None:
    """And look at nothing: this material would stop several of them."""
    assert sift(answers("", "x", "spam spam spam spam spam spam")) == [None] * 3
    assert sift([], stubs=True, duplicates=0.5, verified=True) == []


def test_every_option_is_a_filter() -> None:
    assert set(FILTERS) == set(Filters.model_fields)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("123456789", "stubs: one line of 9 characters, fewer than 10"),
        ("  123456789\n", "stubs: one line of 9 characters, fewer than 10"),
        ("1234567890", None),
        ("a\nb", None),
    ],
)
def test_stubs_are_one_short_line(text: str, reason: str | None) -> None:
    assert sift(answers(text), stubs=True) == [reason]


def test_lengths_count_tokens_and_words_where_a_server_sends_none() -> None:
    written = answers("one two three", "one two three four")
    assert sift(written, min_tokens=4) == ["min_tokens: 3 tokens, fewer than 4", None]
    assert sift(written, max_tokens=3) == [None, "max_tokens: 4 tokens, more than 3"]
    from_server = answers("one two three", "one two three four", tokens=[])
    assert sift(from_server, min_tokens=4) == ["min_tokens: 3 words, fewer than 4", None]
    assert sift(answers("a b", tokens=[7] * 5), max_tokens=4) == ["max_tokens: 5 tokens, more than 4"]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("a b c d", 0),
        ("a b c d a b c", 0),  # seven words, no four of which stood before
        ("a b c d a b c d", 4 / 8),
        ("a b c d x a b c d", 4 / 9),
        ("a b c d e a b c d e f", 5 / 11),  # two 4-grams, whose words count once
        ("no no no no no no no no no no", 9 / 10),
        ("((((((((((", 9 / 10),  # signs are words
        ("x = x + 1\ny = y + 1", 0),  # `= x +` is not `= y +`
        ("。" * 20, 19 / 20),
        ("我们走吧我们走吧", 4 / 8),  # no spaces, and words all the same
    ],
)
def test_the_repeated_share_by_hand(text: str, share: float) -> None:
    assert repeated_share(text) == pytest.approx(share)


def test_repetition_on_both_sides_of_its_limit() -> None:
    half = answers("a b c d a b c d")
    assert sift(half, repetition=0.5) == [None]
    assert sift(half, repetition=0.49) == ["repetition: 50.0% of the words repeat, more than 49.0%"]


GERMAN = "Zuerst prüfen wir, ob die Liste leer ist, und geben dann den größten Wert zurück."
ENGLISH = "First we check whether the list is empty, and then we return the largest value."


def test_languages_are_told_apart_outside_of_code() -> None:
    code = "```python\nreturn max(values)\n```"
    written = answers(ENGLISH, GERMAN, f"{GERMAN}\n{code}", f"{code}\n{ENGLISH} `größter_Wert_der_Liste`")
    found = sift(written, language="en")
    assert [reason and reason.split("(")[0] for reason in found] == [
        None,
        "language: de ",
        "language: de ",
        None,
    ]
    assert found[1] == "language: de (100% sure), not en"
    assert [reason is None for reason in sift(written, language="de")] == [False, True, True, False]


LANGUAGES = {
    "fr": "La fonction prend une liste de nombres et renvoie le plus grand.",
    "es": "La función recibe una lista de números y devuelve el mayor.",
    "it": "La funzione prende una lista di numeri e restituisce il più grande.",
    "pt": "A função recebe uma lista de números e devolve o maior.",
    "nl": "De functie neemt een lijst met getallen en geeft het grootste terug.",
    "pl": "Funkcja przyjmuje listę liczb i zwraca największą z nich.",
    "sv": "Funktionen tar en lista med tal och returnerar det största.",
    "cs": "Funkce přijme seznam čísel a vrátí největší z nich.",
    "tr": "Fonksiyon bir sayı listesi alır ve en büyüğünü döndürür.",
    "vi": "Hàm nhận một danh sách các số và trả về số lớn nhất.",
    "id": "Fungsi ini menerima daftar angka dan mengembalikan yang terbesar.",
    "ru": "Функция принимает список чисел и возвращает наибольшее.",
    "uk": "Функція приймає список чисел і повертає найбільше.",
    "zh": "这个函数接收一个数字列表并返回最大的数。",
    "ja": "この関数は数のリストを受け取り、最大の値を返します。",
    "ko": "이 함수는 숫자 목록을 받아 가장 큰 값을 반환합니다.",
    "ar": "تأخذ الدالة قائمة من الأعداد وتعيد أكبرها.",
    "hi": "यह फलन संख्याओं की सूची लेता है और सबसे बड़ी लौटाता है।",
}


def test_one_sentence_is_enough_to_tell_a_language() -> None:
    written = answers(*LANGUAGES.values())
    assert None not in sift(written, language="en")
    for i, code in enumerate(LANGUAGES):
        assert sift(written[i : i + 1], language=code) == [None]


def test_english_stories_are_english(shared: Path) -> None:
    text = (shared / "data" / "tinystories" / "stories.txt").read_text(encoding="utf-8")[:200_000]
    sentences = [" ".join(one.split()) for one in re.split(r"(?<=[.!?])\s+|<.endoftext.>", text)]
    enough = [one for one in sentences if sum(map(str.isalpha, one)) >= 30]
    assert len(enough) > 1000
    assert sift(answers(*enough), language="en") == [None] * len(enough)


def test_texts_too_short_or_without_words_pass_in_any_language() -> None:
    texts = [
        "4",
        "OK",
        "x = 5, so 2x + 3 = 13.",
        "0x7fff5fbff8c0 0x00000001 0xdeadbeef",  # a detector that knows no "no language" is sure of one
        "Use `Zuerst prüfen wir die Liste`",
        "```python\nGröße = 'Länge des größten Wertes'\n```",
    ]
    for code in ("en", "de", "ja"):
        assert sift(answers(*texts), language=code) == [None] * len(texts)


def test_an_answer_to_a_row_with_tests_is_code_unless_it_has_a_fence() -> None:
    bare = f"    # {GERMAN}\n    return 2 * x"
    assert sift(answers(bare, row=DOUBLE), language="en") == [None]
    assert sift(answers(bare), language="en") != [None]
    assert sift(answers(f"{GERMAN}\n```\nreturn 2 * x\n```", row=DOUBLE), language="en") != [None]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("    return 2 * x", None),
        ("    return 2 *", "parses: SyntaxError: invalid syntax (line 3)"),
        ("Twice:\n```python\ndef solve(x):\n    return 2 * x\n```", None),
        ("```python\n# nothing\n```", "parses: no statement in it"),
        ("```\nprint('\\d')\n```", None),  # no warning either
    ],
)
def test_programs_parse_or_not(answer: str, reason: str | None) -> None:
    assert sift(answers(answer, row=DOUBLE), parses=True) == [reason]


@pytest.mark.parametrize(
    "source",
    [
        "x = 1\0",
        "(" * 10_000,
        "-" * 100_000 + "1",
        "1+" * 100_000 + "1",
        "x = '\ud800'",
        "9" * 5000,
        "if x:\n",
    ],
)
def test_hostile_programs_are_refused_and_stop_nothing(source: str) -> None:
    reason = why_no_python(source)
    assert reason
    assert "Error: " in reason
    assert not reason.endswith(": ")
    (found,) = sift(answers(f"```python\n{source}\n```"), parses=True)
    assert found is not None
    assert len(found) <= 250
    assert "\n" not in found


def test_right_programs_pass_and_wrong_ones_say_why() -> None:
    written = answers("    return 2 * x", "    return x", "    return 2 *", "    return 2 * x", row=DOUBLE)
    assert sift(written, verified=True) == [
        None,
        "verified: solve(2) gave 2, not 4",
        "verified: SyntaxError: invalid syntax (<program>, line 3)",
        None,
    ]


def test_programs_that_are_no_text_are_wrong_and_stop_nothing() -> None:
    (found,) = sift(answers("    return '\ud800'", row=DOUBLE), verified=True)
    assert found is not None
    assert found.startswith("verified: ")


def test_the_seconds_of_a_test_are_the_material_s() -> None:
    written = answers("    while True: pass", row=DOUBLE)
    assert sift(written, Material(seconds=0.2), verified=True) == [
        "verified: solve(2): timed out after 0.2 s"
    ]


def test_answers_equal_one_of_the_references() -> None:
    row = Row(prompt="6 times 7?", references=("42", "forty two"), task="summary")
    written = answers(" 42\n", "forty\ntwo", "41", "42 and more", row=row)
    assert sift(written, verified=True) == [
        None,
        None,
        "verified: '41' equals none of 2 references",
        "verified: '42 and more' equals none of 2 references",
    ]


def test_tests_decide_where_there_are_references_too() -> None:
    row = Row(prompt=DOUBLE.prompt, tests=DOUBLE.tests, references=("    return x + 2",))
    written = answers("    return x + 3", "    return x + 2", "    return x", row=row)
    assert [one is None for one in sift(written, verified=True)] == [False, True, False]
    row = Row(prompt=DOUBLE.prompt, tests=DOUBLE.tests, references=("    return x",))
    assert sift(answers("    return x", row=row), verified=True) == ["verified: solve(2) gave 2, not 4"]


def test_rows_that_nothing_verifies_are_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:3: `generate\.filters\.verified` needs `tests` or"):
        sift(answers("4", row=Row(prompt="?", origin="data.jsonl:3")), verified=True)


def test_worked_steps_are_no_part_of_what_is_parsed_and_verified() -> None:
    row = Row(prompt="6 times 7?", references=("42",))
    texts = "<think>41, no</think>42", "<think>42</think>41"
    with_marks = Material(reasoning=MARKS)
    assert [reason is None for reason in sift(answers(*texts, row=row), with_marks, verified=True)] == [
        True,
        False,
    ]
    assert [reason is None for reason in sift(answers(*texts, row=row), verified=True)] == [False, False]
    thought = f"<think>{GERMAN}</think>    return 2 * x"
    assert sift(answers(thought, row=DOUBLE), with_marks, parses=True, verified=True) == [None]
    assert sift(answers(thought, row=DOUBLE), parses=True) != [None]
    assert sift(answers(thought, row=DOUBLE), with_marks, language="en") != [None]


def test_perplexity_is_the_teacher_s_and_else_the_server_s() -> None:
    written = answers("a", "b", "c")
    material = Material(nll=lambda some: np.log([10.0, 10.1, np.nan]))
    assert sift(written, material, perplexity=10.05) == [
        None,
        "perplexity: 10.1, more than 10.05",
        "perplexity: nan, more than 10.05",
    ]
    far = Material(nll=lambda some: np.array([1e4] * 3))
    assert [one is not None for one in sift(written, far, perplexity=2.0)] == [True] * 3
    from_server = [one._replace(mean_nll=float(np.log(9 + one.prompt))) for one in written]
    assert sift(from_server, perplexity=10.5)[1:] == [None, "perplexity: 11, more than 10.5"]
    with pytest.raises(DataError, match="the server gave no log-probabilities"):
        sift(written, perplexity=10.5)


def test_the_teacher_looks_only_at_what_is_kept_and_once() -> None:
    looked: list[list[int]] = []

    def nll(some: Sequence[Written]) -> np.ndarray:
        looked.append([one.prompt for one in some])
        return np.arange(len(some), dtype=float)

    material = Material(nll=remembered(nll))
    written = [
        *answers("stub", "long enough", "long enough too"),
        answers("another long one")[0]._replace(prompt=2),
    ]
    written[3] = written[3]._replace(sample=1)
    found = sift(written, material, stubs=True, perplexity=1e9)
    assert looked == [[1, 2, 2]]
    assert keep(written, found, "best", material.nll)[2:] == [
        None,
        "keep: answer 0 is likelier, 1 nats a token against 2",
    ]
    assert looked == [[1, 2, 2]]
    sift(answers("stub", "a"), Material(nll=nll), stubs=True, perplexity=1e9)
    assert looked == [[1, 2, 2]]  # not even with an empty list


HELD_OUT = [
    Row(prompt="Write the sum of all the even numbers below ten.", completion="total = 20", origin="test:1"),
    Row(
        messages=(
            {"role": "system", "content": "You answer as briefly as you can"},
            {"role": "user", "content": "What is the longest river of northern Africa?"},
            {"role": "assistant", "content": "It is the Nile, as you know."},
        ),
        origin="test:2",
    ),
    Row(text="a b c d e f", references=("the tallest hill there",), tests=("assert hill(1, 2) == 3",)),
]


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("He said: SUM,\nof all\tthe -- even (numbers) below!", "test:1"),  # 7 of its words, 5 are enough
        ("The sum of all", None),  # 4 words
        ("The sum of all even numbers", None),  # 4 in a row, and 2
        ("the longest river of Northern Europe", "test:2"),
        ("it is: the Nile - as ever", "test:2"),
        ("You answer as briefly as you can", None),  # a system message, which stands before many rows
        ("as you know. a b", None),  # n-grams end with their text
        ("assert hill(1, 2)", None),
        ("assert hill(1,2)==3", ""),
        ("tallest hill there total = 20", None),
    ],
)
def test_held_out_words_are_found_across_lines_and_signs(text: str, origin: str | None) -> None:
    material = Material(held_out=HELD_OUT)
    (found,) = sift(answers(text), material, decontaminate=5)
    assert (found is None) == (origin is None)
    if found is not None:
        assert found.startswith(f"decontaminate: the answer has 5 words of {origin}: ")
        shared = found.split(': "')[1].rstrip('"')
        assert shared in " ".join(plain_words(text))
        assert len(shared.split()) == 5


def test_the_prompt_counts_as_the_answer_does() -> None:
    row = Row(prompt="Now write the sum of all the even numbers")
    (found,) = sift(answers("Fine.", row=row), Material(held_out=HELD_OUT), decontaminate=6)
    assert found is not None
    assert found.startswith('decontaminate: the prompt has 6 words of test:1: "write the sum of all the"')
    system = Row(
        messages=(
            {"role": "system", "content": "the sum of all the even numbers"},
            {"role": "user", "content": "Go on"},
        )
    )
    assert sift(answers("Fine.", row=system), Material(held_out=HELD_OUT), decontaminate=5) == [None]


def test_n_grams_against_brute_force() -> None:
    """Every planted window is found, and one word less of each is not."""
    held = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    for n in (1, 2, 5, 8):
        material = Material(held_out=[Row(prompt=" ".join(held), origin="here")])
        for start in range(len(held) - n + 1):
            words = held[start : start + n]
            assert sift(answers(f"x {' '.join(words)} y"), material, decontaminate=n) != [None]
            broken = [*words[: n // 2], "x", *words[n // 2 + 1 :]]
            assert sift(answers(f"x {' '.join(broken)} y"), material, decontaminate=n) == [None]
        assert len(ngrams_of(material.held_out, n)) == len(held) - n + 1


def test_an_answer_falls_to_the_first_filter_and_the_later_ones_do_not_see_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Filter k of the list drops answers k and k + 1; the second of them is there for it no more."""
    seen: dict[str, list[int]] = {}
    for k, name in enumerate(FILTERS):

        def look(written: Sequence[Written], value: Any, material: Material, k: int = k, name: str = name):
            seen[name] = [one.prompt for one in written]
            return [f"by {k}" if one.prompt in (k, k + 1) else None for one in written]

        monkeypatch.setitem(FILTERS, name, look)
    everything = Filters(
        stubs=True,
        min_tokens=1,
        max_tokens=1,
        language="en",
        parses=True,
        verified=True,
        repetition=0.5,
        perplexity=2.0,
        duplicates=1.0,
        decontaminate=1,
    )
    already = [None] * 12 + ["empty"]
    found = reasons(answers(*"abcdefghijklm"), everything, Material(), already)
    expected = ["stubs: by 0", *(f"{name}: by {k}" for k, name in enumerate(FILTERS)), None, "empty"]
    assert found == expected
    assert seen["stubs"] == list(range(12))
    assert [seen[name] for name in [*FILTERS][1:]] == [list(range(k + 1, 12)) for k in range(1, len(FILTERS))]
    assert already == [None] * 12 + ["empty"]
    assert summary(found) == {"empty": 1, "stubs": 2} | dict.fromkeys([*FILTERS][1:], 1)
    assert list(summary(found)) == ["empty", *FILTERS]


def test_reasons_are_one_short_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILTERS, "stubs", lambda written, value, material: ["far\ntoo " + "long " * 99])
    (found,) = sift(answers("a"), stubs=True)
    assert found is not None
    assert found.startswith("stubs: far too long long ")
    assert found.endswith("...")
    assert len(found) == len("stubs: ") + 200


def test_a_copy_does_not_fall_to_an_answer_that_is_dropped_itself() -> None:
    """Which is why `duplicates` comes last: the first of these two is unlikely, the second is fine."""
    twice = [Written(0, i, PLAIN, "it is the very same", [1], True) for i in range(2)]
    material = Material(nll=lambda some: np.array([9.0 * (one.sample == 0) for one in some]))
    found = sift(twice, material, perplexity=5.0, duplicates=1.0)
    assert [one and one.partition(":")[0] for one in found] == ["perplexity", None]
    assert [*FILTERS][-1] == "duplicates"


def samples(*nats: float, prompt: int = 0) -> list[Written]:
    return [Written(prompt, i, PLAIN, f"answer {i}", [i], True, value) for i, value in enumerate(nats)]


def test_the_first_that_passed_is_kept_by_sample_number() -> None:
    written = [*samples(3, 2, 1)[::-1], *samples(1, 2, prompt=1), *samples(1, prompt=2)]
    found: list[str | None] = [None, None, "stubs: no", None, None, "stubs: no"]
    assert keep(written, found, "all", None) == found
    kept = keep(written, found, "first", None)
    assert kept == [
        "keep: answer 1 is the first that passed",
        None,
        "stubs: no",
        None,
        "keep: answer 0 is the first that passed",
        "stubs: no",
    ]
    assert summary(kept) == {"stubs": 2, "keep": 2}
    assert found[0] is None  # what was given stays as it was


def test_the_best_is_the_likeliest_a_token_and_of_equals_the_first() -> None:
    written = [*samples(3, 0.5, 1), *samples(2, 2, prompt=1), *samples(float("nan"), 9, prompt=2)]
    found: list[str | None] = [None, "stubs: no", None, *[None] * 4]
    expected = [
        "keep: answer 2 is likelier, 1 nats a token against 3",
        "stubs: no",
        None,
        None,
        "keep: answer 0 is likelier, 2 nats a token against 2",
        "keep: answer 1 is likelier, 9 nats a token against inf",
        None,
    ]
    assert keep(written, found, "best", None) == expected
    backwards = keep(written[::-1], found[::-1], "best", None)[::-1]
    assert backwards == expected  # whatever the order in which they stand


def test_the_teacher_is_asked_only_where_there_is_a_choice() -> None:
    asked_for: list[tuple[int, int]] = []

    def nll(some: Sequence[Written]) -> np.ndarray:
        asked_for.extend((one.prompt, one.sample) for one in some)
        return np.array([float(one.sample) for one in some])

    written = [*samples(0, 0), *samples(0, prompt=1), *samples(0, 0, prompt=2)]
    found: list[str | None] = [None, None, None, "stubs: no", None]
    assert keep(written, found, "best", nll)[0] is None
    assert asked_for == [(0, 0), (0, 1)]
    with pytest.raises(DataError, match="`generate.keep` 'best'"):
        keep([one._replace(mean_nll=None) for one in written], found, "best", None)


def test_words_of_many_scripts() -> None:
    assert words_and_signs("x_1 = f(2)\n\tdon't") == ["x_1", "=", "f", "(", "2", ")", "don", "'", "t"]
    assert plain_words("Don't  SHOUT: naïve_Ärger -- 3.5!") == ["don", "t", "shout", "naïve_ärger", "3", "5"]
    assert plain_words("हिन्दी में") == ["हिन्दी", "में"]  # vowel signs are no letters, and part no words
    assert plain_words("他走了。ねこ") == ["他", "走", "了", "ね", "こ"]
    assert plain_words("co\u00adoperate Stra\u00dfe") == ["cooperate", "strasse"]
    assert plain_words("cafe\u0301") == plain_words("caf\u00e9")
    assert asked(HELD_OUT[1]) == ["What is the longest river of northern Africa?"]
    assert asked(HELD_OUT[2]) == ["a b c d e f"]


@pytest.mark.parametrize(
    ("package", "option"), [("py3langid", {"language": "en"}), ("datasketch", {"duplicates": 0.8})]
)
def test_a_missing_package_comes_with_the_line_that_installs_it(
    package: str, option: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_distill.filters.language import load_detector

    load_detector.cache_clear()
    for name in [*sys.modules]:
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"pip install 'mlx-distill\[filters\]'"):
        sift(answers("some text"), **option)
    assert sift(answers("some text"), stubs=True, duplicates=1.0) == [
        "stubs: one line of 9 characters, fewer than 10"
    ]
