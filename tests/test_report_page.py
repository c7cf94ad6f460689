"""The report in a real browser: it asks for nothing, fits a phone, and shows the evaluation's numbers."""

import io
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import browser
import pytest
from test_report import HOSTILE, MODELS, make_run

from mlx_distill import metrics as m
from mlx_distill.frontier import Measured, frontier
from mlx_distill.report import write_comparison, write_report
from mlx_distill.report_frontier import write_frontier
from mlx_distill.run_record import read_run

PHONE, DESKTOP = 390, 1200
WIDE = (
    "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    found = browser.find()
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is on the path")
    opened = browser.Browser(found, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report, a comparison and a frontier, with hostile texts in each place that a model writes to."""
    pytest.importorskip("matplotlib")
    root = tmp_path_factory.mktemp("runs")
    speed = [
        {"prompt_tokens": length, "decode_tokens_per_second": 90.0 + length, "time_to_first_token_ms": 5.5}
        for length in (128, 512)
    ]
    models: dict[str, dict[str, Any]] = {name: {**found, "speed": speed} for name, found in MODELS.items()}
    models["student"]["harness_arc_easy_acc"] = 0.5125
    one, two = make_run(root / "one", models=models), make_run(root / "two", name="a-longer-name-than-that")
    long = {**json.loads((one / "samples" / "evaluation.jsonl").read_text(encoding="utf-8").split("\n")[0])}
    long["prompt"] = "x" * 3000 + HOSTILE
    with open(one / "samples" / "evaluation.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(long) + "\n")
    found = frontier([Measured("one", models), Measured("two", MODELS)], "pass@1", 0.9)
    return {
        "report": write_report(one),
        "comparison": write_comparison([one, two], root / "both.html"),
        "frontier": write_frontier(root, found, [read_run(one), read_run(two)], "frontier"),
    }


each = pytest.mark.parametrize("name", ["report", "comparison", "frontier"])


@each
def test_the_page_asks_for_nothing_and_the_console_is_empty(
    chromium: browser.Browser, pages: dict[str, Path], name: str
) -> None:
    chromium.open(pages[name])
    assert chromium.requests == [pages[name].resolve().as_uri()]
    assert chromium.complaints == []
    assert chromium.run("document.scripts.length + document.images.length") == 0


def test_what_a_page_forbids_would_be_seen(
    chromium: browser.Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    """The usual mistake, a text that is not escaped: the browser then tells, and still sends nothing."""
    html = (
        pages["report"]
        .read_text(encoding="utf-8")
        .replace("</main>", f"{HOSTILE}<p onclick='1'>x</p></main>")
    )
    broken = tmp_path / "broken.html"
    broken.write_text(html, encoding="utf-8")
    chromium.open(broken)
    assert len([line for line in chromium.complaints if "Content Security Policy" in line]) >= 2
    assert not [url for url in chromium.requests if url.startswith("http")]
    broken.write_text(
        html.replace("Content-Security-Policy", "x").replace("alert(", "void ("), encoding="utf-8"
    )
    chromium.open(broken)
    assert [url for url in chromium.requests if "evil.example" in url], (
        "without the policy it would be asked for"
    )


@each
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_page_fits_its_window(
    chromium: browser.Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    chromium.open(pages[name], width)
    chromium.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert chromium.run("innerWidth") == width
    assert chromium.run("document.documentElement.scrollWidth") <= width
    beside = chromium.run(f"{WIDE}.filter(e => !e.closest('.wide')).map(e => e.outerHTML.slice(0, 99))")
    assert beside == [], "what is wider stands in a box that scrolls"
    boxes = chromium.run("[...document.querySelectorAll('.wide')].every(e => e.tabIndex == 0 && e.ariaLabel)")
    assert boxes, "and that the keyboard reaches"


@each
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_no_letter_is_too_small(
    chromium: browser.Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    """In CSS pixels, and in a figure after it is stretched to its column."""
    chromium.open(pages[name], width)
    drawn = chromium.run(
        "[...document.querySelectorAll('svg text')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getScreenCTM().a)"
    )
    assert len(drawn) > 10 and min(drawn) >= 9
    written = "[...document.querySelectorAll('main :is(p, td, th, li, dd, span, small, pre, code)')]"
    assert chromium.run(f"Math.min(...{written}.map(e => parseFloat(getComputedStyle(e).fontSize)))") >= 9


def test_the_numbers_on_the_page_are_those_of_the_evaluation(
    chromium: browser.Browser, pages: dict[str, Path]
) -> None:
    """Every metric of every model, read off the table as a person does: by its row and its column."""
    chromium.open(pages["report"])
    cells = chromium.run("""[...document.querySelectorAll('main section')].flatMap(section =>
        [...section.querySelectorAll('data[data-metric]')].map(data => [
            section.querySelector('h2').textContent, data.closest('tr').querySelector('th').textContent,
            data.closest('table').tHead.rows[0].cells[data.closest('td').cellIndex].title.split(':')[0],
            data.dataset.metric, data.value]))""")
    models = json.loads((pages["report"].parent / "evaluation.json").read_text(encoding="utf-8"))["models"]
    labels = {name: m.label(name, models) for name in models}
    found = {}
    for title, model, heading, metric, value in cells:
        assert heading == metric
        if not title.startswith("Speed"):
            assert (model, metric) not in found
            found[model, metric] = float(value)
    hidden = ("problems", "_stderr", "_spread", "_why")
    expected = {
        (labels[name], metric): value
        for name, metrics in models.items()
        for metric, value in metrics.items()
        if m.number(value) is not None and not metric.endswith(hidden)
    }
    assert found == expected
    assert ("student", "harness_arc_easy_acc") in found, "a metric that nobody foresaw has a column too"
    speeds = [cell for cell in cells if cell[0].startswith("Speed")]
    assert len(speeds) == len(models) * 2 * 2


def test_what_is_written_is_the_number_rounded(chromium: browser.Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["report"])
    for metric in (*m.QUALITY, *m.COST):
        shown = f"[...document.querySelectorAll('data[data-metric=\"{metric.name}\"]')]"
        for exact, text in chromium.run(f"{shown}.map(e => [e.value, e.textContent])"):
            assert text == metric.write(float(exact))


def test_the_differences_on_the_page_are_those_of_the_evaluation(
    chromium: browser.Browser, pages: dict[str, Path]
) -> None:
    chromium.open(pages["report"])
    rows = "[...document.querySelectorAll('.compared li:not(.head)')]"
    shown = chromium.run(
        f"{rows}.map(e => [e.querySelector('data').value, e.querySelector('.word').innerText])"
    )
    tree = json.loads((pages["report"].parent / "evaluation.json").read_text(encoding="utf-8"))
    assert [float(value) for value, _ in shown] == [one["difference"] for one in tree["comparisons"]]
    first = [word.split(" ", 1) for _, word in shown if word]
    assert [word for _, word in first] == [one["verdict"] for one in tree["comparisons"]][: len(first)]
    assert len({sign for sign, _ in first}) == len({word for _, word in first}) == 3


def test_a_token_says_what_both_would_have_written(chromium: browser.Browser, pages: dict[str, Path]) -> None:
    """On a phone too: a tap focuses it, the words stay within the window, and the keyboard reaches them."""
    chromium.open(pages["report"], PHONE)
    one = "document.querySelector('mark.k4.other')"
    chromium.run(f"{one}.focus()")
    assert chromium.run(f"document.activeElement == {one}")
    said = chromium.run(f"getComputedStyle({one}, '::after').content")
    assert "KL 1.40 nats" in said and "teacher" in said and "the student" in said
    assert chromium.run("document.documentElement.scrollWidth") <= PHONE
    assert chromium.run(f"{one}.tabIndex") == 0


def test_the_page_has_landmarks_and_no_heading_is_skipped(
    chromium: browser.Browser, pages: dict[str, Path]
) -> None:
    chromium.open(pages["report"])
    assert chromium.run("['header', 'nav', 'main'].map(e => document.querySelectorAll(e).length)") == [
        1,
        1,
        1,
    ]
    levels = chromium.run("[...document.querySelectorAll('h1, h2, h3, h4')].map(e => +e.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert chromium.run("[...document.querySelectorAll('nav a')].every(e => document.querySelector(e.hash))")
    assert chromium.run("[...document.querySelectorAll('[role=img]')].every(e => e.ariaLabel.length > 20)")


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_light_and_dark_are_both_drawn(
    chromium: browser.Browser, pages: dict[str, Path], tmp_path: Path, width: int
) -> None:
    image = pytest.importorskip("PIL.Image")
    means = []
    for dark in (False, True):
        chromium.open(pages["report"], width, dark)
        chromium.screenshot(tmp_path / "page.png")
        with image.open(io.BytesIO((tmp_path / "page.png").read_bytes())) as shot:
            assert shot.width == width and shot.height > 2000
            grey = shot.convert("L")
            histogram = grey.histogram()
            means.append(sum(value * count for value, count in enumerate(histogram)) / sum(histogram))
            assert len([count for count in histogram if count]) > 50, "a blank page has one grey"
            third = grey.height // 3
            for top in range(0, grey.height - third + 1, third):  # nothing is missing further down
                low, high = grey.crop((0, top, grey.width, top + third)).getextrema()
                assert high - low > 100
    assert means[0] > 200 and means[1] < 60
