"""A row of data, and the JSONL files that hold rows.

Each line is an object in one of mlx-lm's three forms, and lines of different forms may stand in one file:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}], "tools": [...]}
    {"prompt": "...", "completion": "..."}      the completion may be absent, for prompts to be answered
    {"text": "..."}

Beside any of them: `tests` (with `setup`), `references`, `choices` (with `answer`) and `task`, which say how
an answer is judged. Other keys are passed over. A line that is none of this is refused with its file, its
number and the reason.
"""

import codecs
import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_distill.errors import DataError, NotFound
from mlx_distill.odd_files import odd

FORMS = ("messages", "prompt", "text")  # the key that makes a form
TASKS = ("code", "summary", "exact", "choice")
_KEYS = (*FORMS, "completion", "tools", "tests", "setup", "references", "choices", "answer", "task")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a data set, before any tokenizer saw it. One of the three forms is filled; of published
    problems `prompt` and `messages` are, for models without and with a chat template."""

    prompt: str | None = None
    completion: str | None = None  # None: an answer is still to be written
    messages: tuple[dict[str, Any], ...] | None = None  # a chat; the last one is the assistant's, or missing
    tools: tuple[dict[str, Any], ...] | None = None  # what the chat template tells the model it may call
    text: str | None = None
    tests: tuple[str, ...] = ()  # Python that judges a generated program, such as `assert f(1) == 2`
    setup: str | None = None  # Python that the tests stand on: imports, helpers; the program never sees it
    loose: bool = False  # True counts as 1 in tests, as Python has it and published problems rely on
    references: tuple[str, ...] = ()  # acceptable summaries or answers, any one of which is right
    choices: tuple[str, ...] = ()  # answers to choose from
    right: int | None = None  # which of the choices is right, from 0; the key `answer` of a file
    task: str | None = None  # "code", "summary", "exact", "choice" or None: which scorer judges the answer
    origin: str = ""  # "data/train.jsonl:17" or "pocket/code/train:17", for messages

    def question(self) -> str:
        """What a person would call the question: the prompt, or the last message that is no answer."""
        if self.messages is None:
            return self.prompt if self.prompt is not None else self.text or ""
        asked = [message for message in self.messages if message["role"] != "assistant"]
        return str(asked[-1].get("content") or "") if asked else ""

    def answer(self) -> str | None:
        """The answer that the data gives: the completion, or a last message of the assistant's."""
        if self.messages is None:
            return self.completion
        last = self.messages[-1]
        return str(last.get("content") or "") if last["role"] == "assistant" else None


def read_jsonl(path: str | Path, at_most: int | None = None) -> list[Row]:
    """The rows of a JSONL file, from its top, in order. Blank lines are passed over.

    Raises:
        NotFound: no such file; names the nearest one that is there.
        DataError: an unreadable or empty file, or the first bad line with its number and the reason.
    """
    path = Path(path)
    rows: list[Row] = []
    if what := odd(path):
        raise DataError(f"{path}: {what}, and no file; it is read more than once, so save it in a file")
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    rows.append(parse_row(_parse_line(line, f"{path}:{number}"), f"{path}:{number}"))
                if len(rows) == at_most:
                    break
    except FileNotFoundError:
        raise no_such_path(path) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not rows:
        raise DataError(f"{path}: empty; one JSON object a line is expected")
    return rows


def parse_row(fields: Any, origin: str) -> Row:
    """The row that a decoded JSON object is.

    Args:
        fields: the object. A key whose value is null counts as absent.
        origin: where it stands; opens every message.

    Raises:
        DataError: no known form or two of them, a wrong type, or nothing in it.
    """
    if not isinstance(fields, dict):
        raise DataError(f'{origin}: an object such as {{"prompt": ...}} is expected; got {_shown(fields)}')
    fields = {key: value for key, value in fields.items() if value is not None}
    forms = [form for form in FORMS if form in fields]
    if len(forms) != 1:
        raise DataError(f"{origin}: {_why_no_form(fields, forms)}")
    if "completion" in fields and "prompt" not in fields:
        raise DataError(f"{origin}: `completion` belongs to a `prompt`, but the row is in form `{forms[0]}`")
    if "tools" in fields and "text" in fields:
        raise DataError(f"{origin}: `tools` needs `messages` or a `prompt`; `text` has no place for them")
    tests = _strings(fields, "tests", origin)
    references = _strings(fields, "references", origin)
    choices = _strings(fields, "choices", origin)
    guess = "code" if tests else "choice" if choices else "summary" if references else None
    task = fields.get("task") or guess
    if task is not None and task not in TASKS:
        raise DataError(f"{origin}: `task` is one of {', '.join(TASKS)}; got {_shown(task)}")
    if task == "exact" and not references:
        raise DataError(f"{origin}: `task` exact compares with `references`; add them")
    right = _right(fields, choices, task, origin)
    if right is not None and "prompt" in fields:
        fields.setdefault("completion", choices[right])
    if "setup" in fields and not tests:
        raise DataError(f"{origin}: `setup` is what `tests` stand on, and there are none; add them")
    return Row(
        prompt=_words(fields, "prompt", origin),
        completion=_words(fields, "completion", origin),
        messages=_messages(fields["messages"], origin) if "messages" in fields else None,
        tools=_objects(fields["tools"], "tools", origin) if "tools" in fields else None,
        text=_words(fields, "text", origin),
        tests=tests,
        setup=_words(fields, "setup", origin),
        references=references,
        choices=choices,
        right=right,
        task=task,
        origin=origin,
    )


def no_such_path(path: Path) -> NotFound:
    """The error for a file or folder that is not there, with the nearest name that is."""
    folder = path.parent
    while not os.path.exists(folder):  # unlike Path's, false for a name that no file system takes
        path, folder = folder, folder.parent  # name the first part of the path that is missing
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    advice = f"did you mean {folder / near[0]}?" if near else f"nothing of that name is in {folder.resolve()}"
    return NotFound(f"{path}: no such file or folder; {advice}")


def _parse_line(line: bytes, origin: str) -> Any:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: byte {error.start + 1} is no UTF-8; save the file as UTF-8") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_doubles)
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: no JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{origin}: JSON nested too deeply") from None
    except ValueError as error:  # from the two functions below, or a number of thousands of digits
        raise DataError(f"{origin}: {error}") from None
    if b"\\u" in line and not _is_encodable(value):
        raise DataError(f"{origin}: half a surrogate pair (\\ud800 to \\udfff alone) is no character")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value; write null or leave the key out")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key `{doubled}` stands twice in one object")
    return fields


def _is_encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _why_no_form(fields: dict[str, Any], forms: list[str]) -> str:
    if forms:
        return f"two forms in one row: {' and '.join(f'`{form}`' for form in forms)}; keep one of them"
    for key in fields.keys() - set(_KEYS):
        near = difflib.get_close_matches(key, FORMS, n=1, cutoff=0.75)
        if near:
            return f"no known form: unknown key `{key}`; did you mean `{near[0]}`?"
    if "completion" in fields:
        return "`completion` without a `prompt`"
    seen = ", ".join(f"`{key[:40]}`" for key in list(fields)[:8]) or "none"
    return f"no known form: needs `messages`, `prompt` (and `completion`) or `text`; its keys: {seen}"


def _words(fields: dict[str, Any], key: str, origin: str) -> str | None:
    if key not in fields:
        return None
    value = fields[key]
    if not isinstance(value, str):
        raise DataError(f"{origin}: `{key}` is a string; got {_shown(value)}")
    if not value.strip():
        raise DataError(f"{origin}: `{key}` is empty")
    return value


def _strings(fields: dict[str, Any], key: str, origin: str) -> tuple[str, ...]:
    value = fields.get(key, [])
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise DataError(f"{origin}: `{key}` is a string or a list of strings; got {_shown(value)}")
    if not all(one.strip() for one in values):
        raise DataError(f"{origin}: `{key}` holds an empty string")
    return tuple(values)


def _right(fields: dict[str, Any], choices: tuple[str, ...], task: str | None, origin: str) -> int | None:
    """The index of the right choice."""
    if task != "choice":
        return None
    if len(choices) < 2:
        raise DataError(f"{origin}: `task` choice needs two `choices` or more; got {len(choices)}")
    answer = fields.get("answer")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(
            f"{origin}: `answer` is the place of the right one of {len(choices)} `choices`, from 0; "
            f"got {_shown(answer)}"
        )
    return answer


def _objects(value: Any, key: str, origin: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise DataError(f"{origin}: `{key}` is a list of objects; got {_shown(value)}")
    return tuple(value)


def _messages(value: Any, origin: str) -> tuple[dict[str, Any], ...]:
    messages = _objects(value, "messages", origin)
    if not messages:
        raise DataError(f"{origin}: `messages` is empty")
    for index, message in enumerate(messages):
        place = f"{origin}: messages[{index}]"
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise DataError(f'{place}: `role` is a string such as "user"; got {_shown(role)}')
        if content is None and message.get("tool_calls"):
            continue  # a call says what to do, and need not say more
        if not isinstance(content, str):
            raise DataError(f"{place}: `content` is a string; got {_shown(content)}")
        if role == "assistant" and not content.strip() and not message.get("tool_calls"):
            raise DataError(f"{place}: `content` is empty")
    return messages


def _shown(value: Any) -> str:
    """A value as JSON has it, cut to what fits in a message."""
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
