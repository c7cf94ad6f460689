"""An OpenAI-compatible server on this machine that plays what servers do, and a clock without waiting."""

import json
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from mlx_distill import endpoint
from mlx_distill.data.rows import Row
from mlx_distill.endpoint.pace import Clock
from mlx_distill.options import Generate
from mlx_distill.written import Written

KEY = "sk-very/secret-key-of-mine-42"


class Reply(NamedTuple):
    """What the server plays for one request."""

    status: int = 200
    body: Any = None  # bytes go out as they are
    headers: Mapping[str, str] = MappingProxyType({})
    drop: bool = False  # end the connection without a word
    before: Callable[[], Any] = lambda: None


def said(text: str | None, finish: str | None = "stop", **choice: Any) -> dict[str, Any]:
    """A chat completion."""
    message = {"role": "assistant", "content": text, **choice.pop("message", {})}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish, **choice}]}


class Fake:
    """An OpenAI-compatible server in a thread: plays its script first, then answers whatever is asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []  # bodies, in the order in which they came
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.script: deque[Reply] = deque()
        self.models = Reply(body={"data": [{"id": "tiny"}, {"id": "other"}]})
        self.answer: Callable[[dict[str, Any]], Reply] = lambda body: Reply(
            body=said(f"answer to {body['messages'][-1]['content']}")
        )
        fake, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.play(fake.models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    fake.asked.append(body)
                    fake.paths.append(self.path)
                    fake.keys.append(self.headers.get("authorization"))
                    reply = fake.script.popleft() if fake.script else None
                self.play(reply if reply is not None else fake.answer(body))

            def play(self, reply: Reply) -> None:
                reply.before()
                if reply.drop:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign] - a client that left
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


class Instant(Clock):
    """A clock on which waiting takes no time, and is written down."""

    def __init__(self) -> None:
        self.time, self.waits = 0.0, []
        self._lock = threading.Lock()

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float, stop: threading.Event) -> bool:
        with self._lock:
            self.waits.append(seconds)
            self.time += seconds
        return stop.is_set()


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.close()


def options(fake: Fake, generate: dict[str, Any] | None = None, **changes: Any) -> Generate:
    server = {"url": fake.url, "model": "tiny", "at_once": 1, **changes}
    return Generate.model_validate({"endpoint": server, **(generate or {})})


def questions(count: int) -> list[tuple[int, Row, int]]:
    return [(i, Row(prompt=f"question {i}", origin=f"data/prompts.jsonl:{i + 1}"), 0) for i in range(count)]


def write(
    given: Generate, rows: list[tuple[int, Row, int]], clock: Clock | None = None, **more: Any
) -> list[Written]:
    assert given.endpoint is not None
    with endpoint.Server(given.endpoint, clock or Instant()) as server:
        return endpoint.write_block(given, rows, seed=7, server=server, **more)


def texts(written: list[Written]) -> list[str]:
    return [one.text for one in written]
