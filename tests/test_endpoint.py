"""A server as the writer: what it is sent, what is read, what is asked again, and what nobody sees."""

import json
import math
import socket
import threading
from typing import Any

import pytest
from fake_server import KEY, Fake, Instant, Reply, fake, options, questions, said, texts, write

from mlx_distill import endpoint
from mlx_distill.data.rows import Row
from mlx_distill.endpoint import exchange
from mlx_distill.endpoint.pace import Pace
from mlx_distill.endpoint.replies import wait_in
from mlx_distill.endpoint.server import PATIENCE
from mlx_distill.errors import DataError, RecipeError, Stopped
from mlx_distill.options import Endpoint, Generate, Reasoning
from mlx_distill.written import Written

__all__ = ["fake"]  # a fixture


# --- What is sent, and what is read -----------------------------------------------------------------


def test_an_answer_is_written_for_each_question_in_their_order(fake: Fake) -> None:
    """Also where the first is answered last: it waits until all others have been."""
    others = threading.Semaphore(0)
    came: list[int] = []

    def reply(body: dict[str, Any]) -> Reply:
        first = body["messages"][-1]["content"] == "question 0"
        before = (lambda: [others.acquire(timeout=10) for _ in range(5)]) if first else lambda: None
        return Reply(body=said(f"to {body['messages'][-1]['content']}"), before=before)

    fake.answer = reply

    def note(one: Written) -> None:
        came.append(one.prompt)
        others.release()

    written = write(options(fake, at_once=3), questions(6), on_answer=note)
    assert texts(written) == [f"to question {i}" for i in range(6)]
    assert [(one.prompt, one.sample, one.tokens, one.finished) for one in written] == [
        (i, 0, [], True) for i in range(6)
    ]
    assert came[-1] == 0, "in the order in which they came, the first would be the last"


def test_a_chat_is_sent_with_system_message_examples_tools_and_settings(fake: Fake) -> None:
    tools = ({"type": "function", "function": {"name": "look"}},)
    row = Row(
        messages=({"role": "user", "content": "why?"}, {"role": "assistant", "content": "the old answer"}),
        tools=tools,
    )
    settings = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "max_tokens": 33}
    given = options(fake, {"system": "be short", "thinking": False, **settings})
    write(given, [(0, row, 0)], examples=[Row(prompt="1 + 1", completion="2")])
    (body,) = fake.asked
    assert fake.paths == ["/v1/chat/completions"]
    assert body["messages"] == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "why?"},
    ]
    assert body["tools"] == list(tools)
    assert body.items() >= {"model": "tiny", "logprobs": True, **settings}.items()
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert fake.keys == [None]


def test_plain_options_send_no_field_that_openai_does_not_know(fake: Fake) -> None:
    write(options(fake), questions(1))
    assert fake.asked[0].keys() == {"model", "messages", "max_tokens", "temperature", "logprobs"}


def test_a_text_completion_sends_the_prompt_as_it_stands(fake: Fake) -> None:
    fake.answer = lambda body: Reply(
        body={"choices": [{"text": f" after {body['prompt']}", "finish_reason": "length"}]}
    )
    (one,) = write(options(fake, chat=False), questions(1))
    assert fake.paths == ["/v1/completions"]
    assert (one.text, one.finished) == (" after question 0", False)
    chat = Row(messages=({"role": "user", "content": "hi"},), origin="chats.jsonl:3")
    with pytest.raises(DataError, match=r"chats.jsonl:3: .*chat` false sends a `prompt`.* has a chat"):
        write(options(fake, chat=False), [(0, chat, 0)])
    with pytest.raises(DataError, match="plain `text` has no prompt"):
        write(options(fake), [(0, Row(text="once upon a time"), 0)])


def test_each_sample_has_a_seed_of_its_own_whatever_is_asked_beside_it(fake: Fake) -> None:
    given = options(fake, {"temperature": 1.0, "samples": 3})
    rows = [(i, row, sample) for i, row, _ in questions(2) for sample in range(3)]
    write(given, rows)
    seeds = {(body["messages"][-1]["content"], body["seed"]) for body in fake.asked}
    assert len(seeds) == 6 and all(0 <= seed < 2**31 for _, seed in seeds)
    fake.asked.clear()
    write(given, rows[::-1][:4])
    assert {(body["messages"][-1]["content"], body["seed"]) for body in fake.asked} < seeds
    fake.asked.clear()
    assert given.endpoint is not None
    endpoint.write_block(given, rows, seed=8)
    assert not {(body["messages"][-1]["content"], body["seed"]) for body in fake.asked} & seeds


def test_log_probabilities_become_the_mean_nll() -> None:
    """Of the chat's form, the text's and mlx-lm's; None where one token's is missing or infinite."""
    chat = {"content": [{"token": "a", "logprob": -0.5}, {"id": 3, "logprob": -1.5}]}
    text = {"tokens": ["a", "b", "c"], "token_logprobs": [-1.0, -2.0, -6.0]}
    assert exchange.read(said("x", logprobs=chat), None).mean_nll == 1.0
    assert exchange.read(said("x", logprobs=text), None).mean_nll == 3.0
    gaps = ({"content": [{"logprob": -1.0}, {}]}, {"token_logprobs": [None, -1.0]})
    for broken in (None, {}, {"content": []}, *gaps, {"token_logprobs": [-1.0, -math.inf]}):
        assert exchange.read(said("x", logprobs=broken), None).mean_nll is None


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_in_a_field_of_its_own_is_put_between_the_marks(field: str) -> None:
    tree = said("42", message={field: "6 times 7"})
    assert exchange.read(tree, Reasoning(open="<a>", close="</a>")).text == "<a>6 times 7</a>42"
    assert exchange.read(tree, None).text == "42"
    assert exchange.read(said("42"), Reasoning()).text == "42"


def test_how_an_answer_ended() -> None:
    assert exchange.read(said("x"), None).finished
    assert not exchange.read(said("x", "length"), None).finished
    assert not exchange.read(said("x", "content_filter"), None).finished
    call = said(None, "tool_calls", message={"tool_calls": [{"id": "1"}]})
    assert exchange.read(call, None)[:2] == ("", True)
    assert exchange.read(said("a \ud800 b"), None).text == "a ? b"


# --- What goes wrong, and passes -------------------------------------------------------------------


PASSING = {
    "an error of the server's": Reply(500, {"error": {"message": "out of memory"}}),
    "overload": Reply(503, b"busy"),
    "a conflict": Reply(409, {"error": "try again"}),
    "a dropped connection": Reply(drop=True),
    "half a JSON": Reply(body=b'{"choices": [{"mess'),
    "a web page": Reply(body=b"<html>welcome</html>"),
    "no choices": Reply(body={"choices": []}),
    "no message": Reply(body={"choices": [{"finish_reason": "stop"}]}),
    "no reason": Reply(body=said("x", None)),
    "no text": Reply(body=said([{"type": "text"}])),  # type: ignore[arg-type]
    "a list": Reply(body=[1]),
}


@pytest.mark.parametrize("reply", PASSING.values(), ids=PASSING)
def test_a_passing_trouble_is_asked_again(fake: Fake, reply: Reply) -> None:
    fake.script.extend([reply, reply])
    clock = Instant()
    assert texts(write(options(fake, retries=2), questions(1), clock)) == ["answer to question 0"]
    assert len(fake.asked) == 3
    assert fake.asked[0] == fake.asked[2], "the same request, its seed too"
    assert [0.75 <= wait / 2**i <= 1.25 for i, wait in enumerate(clock.waits)] == [True, True]


@pytest.mark.parametrize("reply", PASSING.values(), ids=PASSING)
def test_a_trouble_that_stays_stops_the_run_so_that_it_can_go_on(fake: Fake, reply: Reply) -> None:
    fake.script.extend([Reply(body=said("first")), *[reply] * 3])
    got: list[Written] = []
    with pytest.raises(Stopped) as caught:
        write(options(fake, retries=2), questions(4), on_answer=got.append)
    line = str(caught.value)
    assert "\n" not in line and fake.url in line
    assert "no answer to data/prompts.jsonl:2 in 3 tries" in line and "1 of 4 answers" in line
    assert caught.value.exit_code == 75
    assert texts(got) == ["first"]
    fake.asked.clear()
    done = {(one.prompt, one.sample): one for one in got}
    written = write(options(fake), questions(4), done=done)
    assert texts(written) == ["first", *(f"answer to question {i}" for i in (1, 2, 3))]
    assert len(fake.asked) == 3, "what is there is not asked for again"


def test_the_reason_is_said(fake: Fake) -> None:
    fake.script.append(PASSING["an error of the server's"])
    with pytest.raises(Stopped, match=r"in 1 try \(status 500: out of memory\)"):
        write(options(fake, retries=0), questions(1))
    fake.script.append(PASSING["no reason"])
    with pytest.raises(Stopped, match="not as it should be: no `finish_reason` in it"):
        write(options(fake, retries=0), questions(1))


def test_a_server_that_asks_for_patience_gets_it(fake: Fake) -> None:
    """From all threads: nobody asks before the time is over."""
    fake.script.append(Reply(429, {"error": "slow"}, {"retry-after": "30"}))
    clock = Instant()
    write(options(fake), questions(2), clock)
    assert sum(clock.waits) == pytest.approx(30)
    fake.script.append(Reply(429, {"error": "slow"}, {"retry-after": str(PATIENCE + 1)}))
    with pytest.raises(Stopped, match=r"wants no request for 601 seconds \(status 429: slow\)"):
        write(options(fake), questions(1))


def test_retry_after_is_a_number_or_a_date() -> None:
    assert wait_in({"retry-after": "7"}) == 7
    date = {"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}
    assert wait_in(date) == 30
    assert wait_in(date | {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert wait_in({}) is None and wait_in({"retry-after": "soon"}) is None
    assert wait_in({"retry-after": "nan"}) == 0


def test_an_answer_that_does_not_come_in_time_is_asked_for_again(fake: Fake) -> None:
    """And one that comes in drops: each byte is in time, the answer is not."""
    late = threading.Event()
    fake.script.append(Reply(body=said("late"), before=lambda: late.wait(10)))
    assert texts(write(options(fake, timeout=0.1), questions(1))) == ["answer to question 0"]
    fake.script.append(Reply(body=said("late"), before=lambda: late.wait(10)))
    with pytest.raises(Stopped, match=r"no answer within 0.1 seconds; see `generate.endpoint.timeout`"):
        write(options(fake, timeout=0.1, retries=0), questions(1))
    late.set()


def test_an_answer_in_drops_has_an_end_too() -> None:
    """Each part of it is in time; the answer is not."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        over = threading.Event()

        def drip() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 40\r\n\r\n")
                try:
                    for _ in range(40):
                        over.wait(0.02)
                        connection.sendall(b" ")
                except OSError:
                    pass

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        server = {"url": f"http://127.0.0.1:{listening.getsockname()[1]}/v1", "model": "m", "timeout": 0.1}
        given = Generate.model_validate({"endpoint": {**server, "retries": 0}})
        with pytest.raises(Stopped, match="did not end within 0.1 seconds"):
            write(given, questions(1))
        over.set()
        thread.join()


def test_requests_keep_the_pace() -> None:
    """At most 6 a minute, in every window of 60 seconds, with four threads at it; without, they do not."""
    for per_minute, kept in ((6.0, True), (None, False)):
        went = _times(Pace(per_minute, clock := Instant()), clock)
        assert len(went) == 20
        crowded = max(sum(start <= at < start + 60 for at in went) for start in went)
        assert (crowded <= 6) == kept


def _times(pace: Pace, clock: Instant) -> list[float]:
    """When 20 requests of four threads went."""
    went: list[float] = []
    one_by_one = threading.Lock()  # so that the clock can be read off

    def go() -> None:
        for _ in range(5):
            with one_by_one:
                assert not pace.turn(threading.Event())
                went.append(clock.now())

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return went


def test_retries_keep_the_pace_too(fake: Fake) -> None:
    fake.script.extend([Reply(500, b"")] * 3)
    clock = Instant()
    write(options(fake, per_minute=2), questions(2), clock)
    assert len(fake.asked) == 5
    assert clock.time == pytest.approx(4 * 30)


def test_an_interrupted_run_asks_no_more(fake: Fake) -> None:
    """The exception that a signal raises in the calling thread ends all threads after their request."""

    def interrupted(_: Written) -> None:
        raise KeyboardInterrupt

    given = options(fake, at_once=2)
    assert given.endpoint is not None
    with endpoint.Server(given.endpoint) as server:
        with pytest.raises(KeyboardInterrupt):
            endpoint.write_block(given, questions(100), seed=7, server=server, on_answer=interrupted)
        for thread in threading.enumerate():
            if thread.name.startswith("endpoint-"):
                thread.join()
    assert len(fake.asked) < 20


# --- What goes wrong, and stays --------------------------------------------------------------------


def refused(fake: Fake, reply: Reply, monkeypatch: pytest.MonkeyPatch | None = None, **changes: Any) -> str:
    fake.answer = lambda _: reply
    with pytest.raises(RecipeError) as caught:
        write(options(fake, at_once=2, **changes), questions(12))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_wrong_model_is_said_with_those_that_are_there(fake: Fake) -> None:
    line = refused(fake, Reply(404, {"error": {"message": "no model 'huge'"}}), model="huge")
    assert line.endswith(
        "/chat/completions is not there (404: no model 'huge'); "
        "`model` 'huge' is not among its own: tiny, other"
    )
    assert len(fake.asked) <= 2, "nobody asks again"
    fake.models = Reply(404, b"")
    assert "`url` goes up to /v1" in refused(fake, Reply(404, b""))
    fake.models = Reply(body={"data": [{"id": "tiny"}]})
    assert "does it answer chats?" in refused(fake, Reply(404, b""))


def test_a_missing_or_refused_key_is_said(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = Reply(401, {"error": {"message": "who are you?"}})
    assert "wants a key (401: who are you?); name the environment variable" in refused(fake, denied)
    monkeypatch.setenv("TINY_KEY", KEY)
    assert "refuses the key in TINY_KEY (401" in refused(fake, denied, key_variable="TINY_KEY")
    denied = Reply(403, {"error": "not for you"})
    assert "refuses the key in TINY_KEY (403: not for you)" in refused(fake, denied, key_variable="TINY_KEY")
    fake.asked.clear()
    monkeypatch.delenv("TINY_KEY")
    assert "TINY_KEY is not set" in refused(fake, denied, key_variable="TINY_KEY")
    monkeypatch.setenv("TINY_KEY", "two words")
    line = refused(fake, denied, key_variable="TINY_KEY")
    assert "spaces" in line and "words" not in line
    assert not fake.asked


def test_a_key_revoked_on_the_way_loses_nothing(fake: Fake) -> None:
    fake.script.extend([Reply(body=said("one")), Reply(401, b"expired")])
    got: list[Written] = []
    with pytest.raises(Stopped, match="wants a key"):
        write(options(fake), questions(3), on_answer=got.append)
    assert texts(got) == ["one"]
    fake.script.append(Reply(401, b"still"))
    with pytest.raises(Stopped, match="wants a key"):
        write(options(fake), questions(3), done={(0, 0): got[0]})


def test_settings_that_the_server_does_not_take_are_said(fake: Fake) -> None:
    line = refused(fake, Reply(400, {"error": "max_tokens is too large"}))
    assert "takes none of the requests (400: max_tokens is too large)" in line
    assert len(fake.asked) < 3 * 12


def test_a_row_that_the_server_does_not_take_is_left_out_with_its_reason(fake: Fake) -> None:
    good = fake.answer
    fake.answer = lambda body: (
        Reply(400, {"detail": "too long"}) if body["messages"][-1]["content"] == "question 1" else good(body)
    )
    told: list[Written] = []
    written = write(options(fake), questions(3), on_answer=told.append)
    assert texts(written) == ["answer to question 0", "", "answer to question 2"]
    assert told == [written[0], written[2]], "it is asked again, should the block not become whole"
    assert [one.refused for one in written] == [None, "400: too long", None]
    assert not written[1].finished


def test_a_server_without_log_probabilities_is_asked_without_and_remembered(fake: Fake) -> None:
    good = fake.answer
    fake.answer = lambda body: Reply(422, {"error": "logprobs?"}) if "logprobs" in body else good(body)
    written = write(options(fake, {"temperature": 1.0}), questions(3))
    assert texts(written) == [f"answer to question {i}" for i in range(3)]
    assert ["logprobs" in body for body in fake.asked] == [True, False, False, False]
    assert all("seed" in body for body in fake.asked)
    fake.asked.clear()
    fake.answer = lambda body: Reply(400, {"error": "seed?"}) if "seed" in body else good(body)
    write(options(fake, {"temperature": 1.0}), questions(3))
    assert ["seed" in body for body in fake.asked] == [True, True, False, False, False]


def test_text_completions_count_log_probabilities_or_switch_them_on(fake: Fake) -> None:
    """OpenAI and vLLM want a number there, mlx-lm's server `true`."""
    good = Reply(body={"choices": [{"text": "x", "finish_reason": "stop"}]})
    fake.answer = lambda body: good if body.get("logprobs") is True else Reply(400, b"must be bool")
    write(options(fake, chat=False), questions(2))
    assert [body.get("logprobs") for body in fake.asked] == [1, True, True]


def test_what_shapes_the_answer_is_never_left_out(fake: Fake) -> None:
    fake.answer = lambda body: Reply(400, {"error": "top_k?"}) if "top_k" in body else Reply(body=said("x"))
    with pytest.raises(RecipeError, match=r"takes none of the requests \(400: top_k\?\)"):
        write(options(fake, {"temperature": 1.0, "top_k": 5}), questions(1))
    assert all("top_k" in body for body in fake.asked)


# --- The key, and where the data goes --------------------------------------------------------------


def test_the_key_goes_out_and_is_seen_nowhere(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the server repeats it: in an error, escaped, at the cut of a long text, in an answer."""
    monkeypatch.setenv("TINY_KEY", KEY)
    given = options(fake, key_variable="TINY_KEY", retries=0)
    assert texts(write(given, questions(1))) == ["answer to question 0"]
    assert fake.keys == [f"Bearer {KEY}"]
    assert KEY not in repr(given) and KEY not in str(vars(endpoint.Server(given.endpoint)))  # type: ignore[arg-type]
    escaped = json.dumps({"error": f"bad key {KEY}"}).replace("/", "\\/").encode()
    for echo in (
        Reply(401, {"error": {"message": f"bad key {KEY}"}}),
        Reply(500, {"error": f"bad key {KEY}"}),
        Reply(500, escaped),
        Reply(500, escaped.replace(b'"error"', b'"fault"')),
        Reply(500, f"{'x' * 190}{KEY}".encode()),
        Reply(307, b"", {"location": f"http://127.0.0.1/?key={KEY.replace('/', '%2F')}"}),
        Reply(404, {"error": KEY}),
    ):
        fake.script.append(echo)
        try:
            shown = str(write(given, questions(1)))
        except (Stopped, RecipeError) as error:
            shown = str(error)
        assert not any(KEY[i : i + 8] in shown for i in range(len(KEY) - 8)), shown
    fake.script.append(Reply(body=said(f"your header was Bearer {KEY}")))
    assert texts(write(given, questions(1))) == ["your header was Bearer ***"]
    assert KEY not in "".join(capsys.readouterr())


def test_a_key_that_is_a_word_stays_in_answers(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers without keys are often given `none` or `EMPTY`; text with these words must survive."""
    monkeypatch.setenv("TINY_KEY", "none")
    fake.script.append(Reply(body=said("there is none")))
    assert texts(write(options(fake, key_variable="TINY_KEY"), questions(1))) == ["there is none"]


def test_a_redirect_is_not_followed(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_KEY", KEY)
    elsewhere = Fake()
    moved = Reply(308, b"", {"location": f"{elsewhere.url}/chat/completions"})
    line = refused(fake, moved, key_variable="TINY_KEY")
    elsewhere.close()
    assert f"sends on to {elsewhere.url}" in line and not elsewhere.asked


def test_no_proxy_of_the_environment_sees_anything(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Fake()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    write(options(fake), questions(1))
    proxy.close()
    assert fake.asked and not proxy.asked


def test_data_that_leaves_the_network_is_said() -> None:
    def line(url: str, **more: Any) -> str | None:
        return endpoint.leaves_network(Endpoint(url=url, model="m", **more))

    for own in (
        "http://127.0.0.1:80/v1",
        "http://192.168.1.20/v1",
        "http://[::1]/v1",
        "http://localhost:1/v1",
    ):
        assert line(own) is None
    assert line("http://10.1.2.3/v1") is None and line("http://100.64.0.9/v1") is None
    said = line("http://93.184.216.34/v1", key_variable="K") or ""
    assert "93.184.216.34 is not on your own network" in said and "and the key go there, unencrypted" in said
    assert "unencrypted" not in (line("https://93.184.216.34/v1", key_variable="K") or "unencrypted")
