"""The server behind `generate.endpoint`: asked at its pace, asked again where that may help, or explained.

The key is read from its environment variable for each request, stands in no object, and is cut out of
whatever the server says before anybody sees it.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

from mlx_distill import keys
from mlx_distill.endpoint.pace import Clock, Pace
from mlx_distill.endpoint.replies import (
    Halted,
    Refused,
    Trouble,
    hidden,
    key_of,
    reason_in,
    wait_in,
    without_key,
)
from mlx_distill.errors import DistillError, RecipeError, Stopped
from mlx_distill.options import Endpoint

LARGEST = 64 << 20  # bytes of one response; what is more is no answer
PATIENCE = 600.0  # seconds that a server may ask to be left alone; longer, and the run stops instead
Answer = TypeVar("Answer")
_AGAIN = {408, 409, 425, 429}  # statuses of a passing trouble, beside those from 500 on
_ROW = {400, 413, 422}  # statuses of a request that the server does not take as it is


class Server:
    """Connections to an endpoint, the pace of its requests, and what it was found to take; threads share it.

    One for a whole run, so that the pace holds across blocks. `with Server(options) as server: ...`
    """

    def __init__(self, options: Endpoint, clock: Clock | None = None):
        import httpx2  # a twentieth of a second that most runs do without

        self.options = options
        self.answered = False  # whether it ever gave an answer
        self.form = 0  # of the request: the first that it took
        self._clock = clock or Clock()
        self._pace = Pace(options.per_minute, self._clock)
        # trust_env: no proxy and no login of the environment's; what is sent goes to this address alone.
        self._client = httpx2.Client(
            trust_env=False,
            follow_redirects=False,
            timeout=httpx2.Timeout(options.timeout, connect=min(options.timeout, 10.0)),
            limits=httpx2.Limits(max_connections=options.at_once + 1),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def post(
        self,
        path: str,
        body: dict[str, Any],
        read: Callable[[Any], Answer],
        *,
        what: str,
        stop: threading.Event,
    ) -> Answer:
        """What `read` makes of the response to a request, asked as often as `retries` allows.

        Args:
            path: below the url.
            read: from the decoded response; a ValueError says what is missing in it.
            what: is asked for, such as the origin of a row; stands in messages, and draws the waiting times.
            stop: ends waiting.

        Raises:
            Refused: the server does not take the request as it is (400, 413, 422).
            RecipeError: no request can succeed: key, url or model are wrong.
            Stopped: the last try failed too.
            Halted: `stop` was set.
        """
        tries = self.options.retries + 1
        for number in range(tries):
            if self._pace.turn(stop):
                raise Halted
            try:
                tree = self._once("POST", path, body)
                try:
                    return read(tree)
                except ValueError as error:
                    raise Trouble(f"its answer is not as it should be: {error}") from None
            except Trouble as trouble:
                if number + 1 == tries:
                    times = "1 try" if tries == 1 else f"{tries} tries"
                    raise Stopped(
                        f"`generate.endpoint`: {self.options.url} gave no answer to {what} in {times} "
                        f"({trouble})"
                    ) from None
                if trouble.wait is not None and trouble.wait > PATIENCE:
                    raise Stopped(
                        f"`generate.endpoint`: {self.options.url} wants no request for {trouble.wait:.0f} "
                        f"seconds ({trouble}); go on after that"
                    ) from None
                self._pace.pause(trouble.wait or 0.0)
                if self._clock.wait(self._backoff(what, number), stop):
                    raise Halted from None
        raise AssertionError("unreachable")

    def models(self, seconds: float) -> list[str] | None:
        """Names of the models that the server offers; None where it does not say.

        Raises:
            Trouble: nobody answers within `seconds`, or in no way that a server of this kind does.
            RecipeError: it wants another key, or sends on to another address.
        """
        try:
            tree = self._once("GET", "models", None, seconds)
        except Refused:
            return None
        data = tree.get("data") if isinstance(tree, dict) else None
        if not isinstance(data, list):
            return None
        names = [one.get("id") for one in data if isinstance(one, dict)]
        return [self._hidden(name) for name in names if isinstance(name, str)]

    def _hidden(self, said: str) -> str:
        return hidden(said, self.options)

    def _backoff(self, what: str, number: int) -> float:
        """1, 2, 4, ... seconds, a quarter more or less, so that threads do not come back together."""
        jitter = keys.generator(0, f"endpoint wait/{what}", number).uniform(0.75, 1.25)
        return float(jitter) * min(60.0, 2.0**number)

    def _once(self, method: str, path: str, body: dict[str, Any] | None, seconds: float | None = None) -> Any:
        """One request and its decoded response.

        Raises:
            Trouble, Refused, RecipeError: as `post`.
        """
        import httpx2

        seconds = self.options.timeout if seconds is None else seconds
        headers = {"accept": "application/json"}
        if key := key_of(self.options):
            headers["authorization"] = f"Bearer {key}"
        timeout = httpx2.Timeout(seconds, connect=min(seconds, 10.0))
        try:
            with self._client.stream(
                method, f"{self.options.url}/{path}", json=body, headers=headers, timeout=timeout
            ) as response:
                status, said_headers = response.status_code, response.headers
                content, ends = bytearray(), time.monotonic() + seconds
                for part in response.iter_bytes():
                    content += part
                    if len(content) > LARGEST or time.monotonic() > ends:
                        raise Trouble(
                            f"its answer did not end within {seconds:g} seconds and {LARGEST >> 20} MiB"
                        )
        except httpx2.TimeoutException as error:
            if isinstance(error, httpx2.ConnectTimeout):
                raise Trouble("nobody answers (no connection in time)") from None
            raise Trouble(f"no answer within {seconds:g} seconds; see `generate.endpoint.timeout`") from None
        except httpx2.ConnectError as error:
            reason = str(error).partition("] ")[2] or str(error)
            raise Trouble(f"nobody answers ({self._hidden(reason).lower()})") from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            reason = self._hidden(str(error)) or type(error).__name__
            raise Trouble(f"the connection broke ({reason})") from None
        text = content.decode("utf-8", "replace")
        if not 200 <= status < 300:
            raise self._explained(status, said_headers, text, path)
        if not text.strip():
            raise Trouble("the connection broke (nothing in the answer)")
        # An echo of the key would end in the samples. A short one, such as `none`, is a word and no secret.
        text = without_key(text, self.options, shortest=16)
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise Trouble(f"its answer is no JSON ({self._hidden(text)[:80]!r})") from None

    def _explained(
        self, status: int, headers: Mapping[str, str], text: str, path: str
    ) -> DistillError | Refused | Trouble:
        """An answer without success as what to do about it."""
        options, place = self.options, "`generate.endpoint`"
        said = f"{status}: {self._hidden(reason_in(text)) or 'no reason given'}"
        hopeless = Stopped if self.answered else RecipeError  # after answers it is no mistake of the recipe's
        if status in _AGAIN or status >= 500:
            return Trouble(f"status {said}", wait_in(headers))
        if status in _ROW or (path == "models" and status in (404, 405)):
            return Refused(said)
        if status == 401 and options.key_variable is None:
            return hopeless(
                f"{place}: {options.url} wants a key ({said}); name the environment variable that holds it "
                f"in `generate.endpoint.key_variable`"
            )
        if status in (401, 403):
            key = f"the key in {options.key_variable}" if options.key_variable else "requests without a key"
            return hopeless(f"{place}: {options.url} refuses {key} ({said}); use one that may do this")
        if status == 404:
            return hopeless(f"{place}: {options.url}/{path} is not there ({said}); {self.offers()}")
        if 300 <= status < 400:
            other = self._hidden(headers.get("location", "elsewhere"))
            return hopeless(
                f"`generate.endpoint.url`: {options.url} sends on to {other} ({status}); "
                "if that server is yours, name it"
            )
        return hopeless(f"{place}: {options.url}/{path} refuses the request ({said})")

    def offers(self) -> str:
        """What `url` and `model` could be instead, as the server tells."""
        try:
            names = self.models(5.0)
        except (Trouble, DistillError):
            names = None
        if not names:
            return "`url` goes up to /v1, and `model` is a name that the server knows"
        if self.options.model in names:
            return "it does offer that model; does it answer chats? see `generate.endpoint.chat`"
        more = ", ..." if len(names) > 10 else ""
        return f"`model` {self.options.model!r} is not among its own: {', '.join(names[:10])}{more}"
