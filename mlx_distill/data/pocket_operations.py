"""The operations of the corpus `pocket`: for each one line of Python and the phrases that mean it.

A phrase means one operation only, and a line of Python has the phrases of one operation only: so the
right docstrings of a function can be listed, and its docstring determines its body. Any change here
changes what a seed generates, and asks for a new teacher; `tests/test_pocket.py` pins it.
"""

from dataclasses import dataclass

NUMBERS, VALUE, TEXT, WORDS = "numbers", "value", "text", "words"  # kinds, and names of the variables

DIGITS = tuple(str(digit) for digit in range(2, 10))
FROM_THREE = DIGITS[1:]  # for multiples: even and odd are operations of their own
FEW = DIGITS[:4]  # for lengths of slices
TIMES = DIGITS[:3]  # for repeated text
LETTERS = tuple("aeiosrtnld")
MARKS = ("-", "+", "*", "/", "!", "?")


@dataclass(frozen=True, slots=True)
class Operation:
    """One step of a function. `{0}` and `{1}` in `code` and in each phrase stand for its constants."""

    name: str
    takes: str
    gives: str
    code: str  # an expression of the variable named `takes`
    phrases: tuple[str, ...]
    constants: tuple[tuple[str, ...], ...] = ()  # the choices for each constant
    family: str = ""  # two neighbours of one family would undo or repeat each other
    swaps: tuple[str, ...] = ()  # operations easily taken for this one: a mutation puts them in its place


def _building(takes: str):
    """A function that builds operations on one kind; unless told, an operation gives what it takes."""

    def op(name, code, phrases, *constants, family="", swaps="", gives=takes):
        return Operation(name, takes, gives, code, phrases, constants, family or name, tuple(swaps.split()))

    return op


def _over_numbers() -> list[Operation]:
    op = _building(NUMBERS)

    keep = "[x for x in numbers if {}]".format
    each = "[{} for x in numbers]".format
    return [
        op("keep_above", keep("x > {0}"),
           ("keep the numbers above {0}", "keep numbers greater than {0}", "drop the numbers up to {0}"),
           DIGITS, swaps="keep_below"),
        op("keep_below", keep("x < {0}"),
           ("keep the numbers below {0}", "keep numbers less than {0}", "drop the numbers from {0} up"),
           DIGITS, swaps="keep_above"),
        op("keep_even", keep("x % 2 == 0"),
           ("keep the even numbers", "drop the odd numbers", "keep only even numbers"),
           family="parity", swaps="keep_odd"),
        op("keep_odd", keep("x % 2 == 1"),
           ("keep the odd numbers", "drop the even numbers", "keep only odd numbers"),
           family="parity", swaps="keep_even"),
        op("keep_multiples", keep("x % {0} == 0"),
           ("keep the multiples of {0}", "keep numbers divisible by {0}", "keep only multiples of {0}"),
           FROM_THREE, family="multiples", swaps="drop_multiples"),
        op("drop_multiples", keep("x % {0} != 0"),
           ("drop the multiples of {0}", "drop numbers divisible by {0}", "remove all multiples of {0}"),
           FROM_THREE, family="multiples", swaps="keep_multiples"),
        op("add", each("x + {0}"),
           ("add {0} to each number", "increase each number by {0}", "raise all numbers by {0}"),
           DIGITS, family="shift", swaps="subtract multiply"),
        op("subtract", each("x - {0}"),
           ("subtract {0} from each number", "decrease each number by {0}", "lower all numbers by {0}"),
           DIGITS, family="shift", swaps="add"),
        op("multiply", each("x * {0}"),
           ("multiply each number by {0}", "scale all numbers by {0}", "make each number {0} times as big"),
           DIGITS, family="scale", swaps="add"),
        op("divide", each("x // {0}"),
           ("divide each number by {0}", "floor divide all numbers by {0}", "take the quotients by {0}"),
           DIGITS, family="scale", swaps="multiply remainder"),
        op("remainder", each("x % {0}"),
           ("take each number modulo {0}", "take the remainders by {0}", "reduce all numbers modulo {0}"),
           DIGITS, swaps="divide"),
        op("negate", each("-x"),
           ("negate each number", "flip the sign of each number", "negate all numbers"),
           family="sign", swaps="absolute"),
        op("absolute", each("abs(x)"),
           ("take absolute values", "drop the sign of each number", "make all numbers positive"),
           family="sign", swaps="negate"),
        op("at_most", each("min(x, {0})"),
           ("cap each number at {0}", "limit all numbers to {0}", "let no number exceed {0}"),
           DIGITS, swaps="at_least"),
        op("at_least", each("max(x, {0})"),
           ("raise smaller numbers to {0}", "let no number fall below {0}", "make each number at least {0}"),
           DIGITS, swaps="at_most"),
        op("sort", "sorted(numbers)",
           ("sort the numbers", "order the numbers upwards", "sort from low to high"),
           family="order", swaps="sort_down reverse"),
        op("sort_down", "sorted(numbers, reverse=True)",
           ("sort the numbers downwards", "order the numbers downwards", "sort from high to low"),
           family="order", swaps="sort reverse"),
        op("reverse", "numbers[::-1]",
           ("reverse the numbers", "turn the list around", "put the numbers backwards"),
           family="order", swaps="sort"),
        op("unique", "list(dict.fromkeys(numbers))",
           ("drop repeated numbers", "keep each number once", "remove duplicates")),
        op("first", "numbers[:{0}]",
           ("keep the first {0} numbers", "take the first {0} numbers", "cut the list to {0} numbers"),
           FEW, family="head", swaps="last skip"),
        op("last", "numbers[-{0}:]",
           ("keep the last {0} numbers", "take the last {0} numbers", "keep {0} numbers at the end"),
           FEW, family="tail", swaps="first"),
        op("skip", "numbers[{0}:]",
           ("skip the first {0} numbers", "drop the first {0} numbers", "start after {0} numbers"),
           FEW, family="head", swaps="first"),
        op("append", "numbers + [{0}]",
           ("append {0}", "put {0} at the end", "add {0} as the last number"),
           DIGITS, swaps="prepend"),
        op("prepend", "[{0}] + numbers",
           ("prepend {0}", "put {0} at the front", "add {0} as the first number"),
           DIGITS, swaps="append"),
        op("sum", "sum(numbers)",
           ("sum the numbers", "add up the numbers", "take the total"), swaps="maximum", gives=VALUE),
        op("maximum", "max(numbers, default=0)",
           ("take the largest number", "find the maximum", "take the biggest number"),
           swaps="minimum", gives=VALUE),
        op("minimum", "min(numbers, default=0)",
           ("take the smallest number", "find the minimum", "take the lowest number"),
           swaps="maximum", gives=VALUE),
        op("length", "len(numbers)",
           ("count the numbers", "take the length of the list", "find how many numbers there are"),
           swaps="sum", gives=VALUE),
        op("count_above", "sum(x > {0} for x in numbers)",
           ("count the numbers above {0}", "count numbers greater than {0}", "find how many exceed {0}"),
           DIGITS, gives=VALUE),
    ]  # fmt: skip


def _over_a_value() -> list[Operation]:
    op = _building(VALUE)
    return [
        op("value_add", "value + {0}",
           ("add {0} to the value", "increase the value by {0}", "raise the value by {0}"),
           DIGITS, family="value_shift", swaps="value_subtract value_multiply"),
        op("value_subtract", "value - {0}",
           ("subtract {0} from the value", "decrease the value by {0}", "lower the value by {0}"),
           DIGITS, family="value_shift", swaps="value_add"),
        op("value_multiply", "value * {0}",
           ("multiply the value by {0}", "scale the value by {0}", "take the value {0} times"),
           DIGITS, family="value_scale", swaps="value_add value_remainder"),
        op("value_remainder", "value % {0}",
           ("take the value modulo {0}", "take the remainder by {0}", "reduce the value modulo {0}"),
           DIGITS),
        op("value_digits", "[int(x) for x in str(abs(value))]",
           ("list the digits", "take the digits of the value", "split the value into digits"),
           gives=NUMBERS),
    ]  # fmt: skip


def _over_text() -> list[Operation]:
    op = _building(TEXT)
    return [
        op("upper", "text.upper()",
           ("change the text to upper case", "write the text in capitals", "make the text upper case"),
           family="case", swaps="lower"),
        op("lower", "text.lower()",
           ("change the text to lower case", "write the text in small letters", "make the text lower case"),
           family="case", swaps="upper"),
        op("text_reverse", "text[::-1]",
           ("reverse the text", "turn the text around", "write the text backwards")),
        op("text_first", "text[:{0}]",
           ("keep the first {0} characters", "take the first {0} characters", "cut the text to length {0}"),
           DIGITS, family="text_head", swaps="text_last text_skip"),
        op("text_last", "text[-{0}:]",
           ("keep the last {0} characters", "take the last {0} characters", "keep {0} characters at the end"),
           DIGITS, family="text_tail", swaps="text_first"),
        op("text_skip", "text[{0}:]",
           ("skip the first {0} characters", "drop the first {0} characters", "start after {0} characters"),
           FEW, family="text_head", swaps="text_first"),
        op("repeat", "text * {0}",
           ("repeat the text {0} times", "write the text {0} times", "make {0} copies of the text"), TIMES),
        op("replace", "text.replace('{0}', '{1}')",
           ("replace '{0}' with '{1}'", "change '{0}' to '{1}'", "turn each '{0}' into '{1}'"),
           LETTERS, MARKS),
        op("remove", "text.replace('{0}', '')",
           ("remove each '{0}'", "delete every '{0}'", "drop all '{0}' letters"), LETTERS),
        op("suffix", "text + '{0}'",
           ("add '{0}' at the end", "append '{0}'", "end the text with '{0}'"),
           MARKS, swaps="prefix"),
        op("prefix", "'{0}' + text",
           ("add '{0}' at the front", "prepend '{0}'", "start the text with '{0}'"),
           MARKS, swaps="suffix"),
        op("text_length", "len(text)",
           ("count the characters", "take the length of the text", "find how long the text is"), gives=VALUE),
        op("count_letter", "text.count('{0}')",
           ("count each '{0}'", "count the letter '{0}'", "find how often '{0}' occurs"),
           LETTERS, gives=VALUE),
        op("split", "text.split()",
           ("split the text into words", "list the words", "take the words of the text"), gives=WORDS),
    ]  # fmt: skip


def _over_words() -> list[Operation]:
    op = _building(WORDS)
    return [
        op("words_sort", "sorted(words)",
           ("sort the words", "put the words in order", "order the words"),
           family="words_order", swaps="words_reverse"),
        op("words_reverse", "words[::-1]",
           ("reverse the words", "turn the words around", "put the words backwards"),
           family="words_order", swaps="words_sort"),
        op("longer", "[w for w in words if len(w) > {0}]",
           ("keep words longer than {0}", "keep words of more than {0} letters",
            "drop words up to length {0}"),
           FEW),
        op("with_letter", "[w for w in words if '{0}' in w]",
           ("keep words with '{0}'", "keep words that contain '{0}'", "drop words that lack '{0}'"),
           LETTERS, family="contain"),
        op("join", "'{0}'.join(words)",
           ("join the words with '{0}'", "join them by '{0}'", "put '{0}' between the words"),
           MARKS, gives=TEXT),
        op("words_length", "len(words)",
           ("count the words", "find how many words there are", "take the number of words"), gives=VALUE),
    ]  # fmt: skip


OPERATIONS = (*_over_numbers(), *_over_a_value(), *_over_text(), *_over_words())
BY_NAME = {operation.name: operation for operation in OPERATIONS}
