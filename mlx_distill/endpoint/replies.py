"""What a server says in place of an answer: why, for how long, and without the key."""

import json
import os
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from urllib.parse import quote

from mlx_distill.errors import RecipeError
from mlx_distill.options import Endpoint


class Trouble(Exception):
    """What went wrong may pass."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait  # seconds that the server asked for


class Refused(Exception):
    """The server does not take this request; why, in its words."""


class Halted(Exception):
    """Somebody else stopped the work."""


def key_of(options: Endpoint) -> str | None:
    """The key, from the environment, now; None where the recipe names no variable.

    Raises:
        RecipeError: the variable is not set, or holds what no key can be. Its value is not shown.
    """
    if options.key_variable is None:
        return None
    place = f"`generate.endpoint.key_variable`: the environment variable {options.key_variable}"
    key = _in_environment(options)
    if not key:
        raise RecipeError(f"{place} is not set; export it, or set the option to null if no key is needed")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise RecipeError(f"{place} holds spaces, line breaks or letters that no key has; set it anew")
    return key


def _in_environment(options: Endpoint) -> str:
    return os.environ.get(options.key_variable or "", "").strip()


def hidden(said: str, options: Endpoint) -> str:
    """What the server said without the key, control characters and line breaks: at most 200 characters."""
    said = without_key(said, options)
    plain = "".join(character if character.isprintable() else " " for character in said)
    return " ".join(plain.split())[:200]


def without_key(said: str, options: Endpoint, shortest: int = 1) -> str:
    """Text with `***` where the key stood, if it has at least so many characters."""
    key = _in_environment(options)
    if len(key) >= shortest:
        for written in (key, json.dumps(key)[1:-1], key.replace("/", "\\/"), quote(key, safe="")):
            said = said.replace(written, "***")
    return said


def reason_in(text: str) -> str:
    """The reason in the body of an error, in the forms that servers give it; else the body."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for key in ("error", "message", "detail"):
        found = tree.get(key) if isinstance(tree, dict) else None
        if isinstance(found, dict):
            found = found.get("message")
        if isinstance(found, str):
            return found
    return text


def wait_in(headers: Mapping[str, str]) -> float | None:
    """Seconds that `Retry-After` asks for: a number, or a date by the server's own clock."""
    asked = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(asked))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(asked).timestamp()
        now = parsedate_to_datetime(headers["date"]).timestamp() if "date" in headers else time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, until - now)
