"""The page: no network, nothing of a record runs, charts are drawn."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dsa_bench.reports import html
from dsa_bench.reports.digest import digest
from dsa_bench.reports.figures import figures
from tests.reports_runs import HOSTILE, FakeRun, h100_run, hostile_run

LIMIT_BYTES = 2_000_000
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page(HTMLParser):
    """Elements with their attributes, and the text of each script and cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        else:
            self.text += data


@pytest.fixture(scope="module")
def good() -> str:
    return html.page(digest([h100_run()]))


@pytest.fixture(scope="module")
def hostile() -> str:
    return html.page(digest([hostile_run()]))


def test_page_is_small(good: str) -> None:
    assert len(good.encode()) < LIMIT_BYTES


def test_page_of_many_cases_is_small() -> None:
    runs = [h100_run(seed) for seed in range(1, 4)]
    for i, run in enumerate(runs):
        run.header = run.header | {"machine": {"name": f"GPU {i}", "device": "cuda"}}
    assert sum(len(run.records) for run in runs) > 280
    assert len(html.page(digest(runs)).encode()) < LIMIT_BYTES


def test_page_refers_to_nothing_outside(good: str) -> None:
    page = Page(good)
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"iframe", "object", "embed", "base", "form"}
    style = re.findall(r"<style>(.*?)</style>", good, re.DOTALL)
    assert len(style) == 1 and "url(" not in style[0] and "@import" not in style[0]


def policy_of(text: str) -> str:
    for tag, attributes in Page(text).elements:
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy":
            return attributes["content"] or ""
    raise AssertionError("the page has no policy")


@pytest.mark.parametrize("name", ["good", "hostile"])
def test_policy_allows_the_scripts_of_the_page_alone(
    name: str, request: pytest.FixtureRequest
) -> None:
    text = request.getfixturevalue(name)
    policy = policy_of(text)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy and "http" not in policy
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    running = [s for attributes, s in Page(text).scripts if "type" not in attributes]
    found = {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in running}
    assert found == allowed and len(running) == 2


def test_no_text_of_a_record_becomes_markup(hostile: str) -> None:
    page = Page(hostile)
    assert {tag for tag, _ in page.elements} <= {
        *("html", "head", "meta", "link", "title", "style", "body", "header", "span", "nav", "a"),
        *("button", "main", "section", "h1", "h2", "h3", "div", "p", "b", "figure", "figcaption"),
        *("noscript", "img", "label", "input", "table", "thead", "tbody", "tr", "th", "td"),
        *("code", "details", "summary", "dl", "dt", "dd", "footer", "script"),
    }
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
    # what a reader sees is the text itself
    assert "<img src=x onerror=alert(3)>" in page.text
    assert "{{ 7*7 }}${7*7}#{7*7}" in page.text


def test_embedded_data_cannot_end_their_script(hostile: str) -> None:
    data = [text for attributes, text in Page(hostile).scripts if "type" in attributes]
    assert len(data) == 1
    assert not set("<>&") & set(data[0])
    assert "\u2028" not in data[0] and "\u2029" not in data[0]
    details = json.loads(data[0])["details"]
    assert len(details) == len(HOSTILE)
    shown = {row[0] for detail in details.values() for row in detail["kernels"]}
    assert HOSTILE[0] in shown


def test_page_shows_headline_counts_and_reasons(good: str) -> None:
    text = " ".join(Page(good).text.split())
    assert digest([h100_run()]).headlines[0] in text
    for part in ("89 ok", "1 wrong", "1 failed", "1 oom", "1 timeout", "2 skipped", "2 ⚑ in doubt"):
        assert part in text
    assert "worker died with signal 11 (segmentation fault)" in text
    assert "1K = 1024" in text and "Attention only" in text
    assert "copy_bytes_per_second" in text and "2.11.0+cu130" in text


def test_each_row_has_its_command(good: str) -> None:
    rows = re.findall(r"<tr data-case=.*?</tr>", good, re.DOTALL)
    assert len(rows) == len(h100_run().records)
    with_time = [row for row in rows if 'class="is-ok"' in row]
    assert len(with_time) == 89
    assert all("<code>dsa-bench run --op" in row for row in with_time)


def test_lead_figures_come_first_and_stand_without_scripts(good: str) -> None:
    names = re.findall(r'data-figure="([^"]+)"', good)
    assert names[:2] == ["speedup-prefill", "speedup-decode"]
    assert sorted(names) == sorted(f.name for f in figures(digest([h100_run()])))
    images = re.findall(r'<noscript><img src="data:image/svg\+xml;base64,([^"]+)"', good)
    assert len(images) == 2
    svg = base64.b64decode(images[0]).decode()
    assert svg.startswith("<svg") and "11.9K" in svg and "@" not in svg


@pytest.mark.parametrize("header", [{}, {"machine": {}, "ceilings": None}])
def test_page_without_results(header: dict[str, object]) -> None:
    text = Page(html.page(digest([FakeRun(Path("r"), header, [])]))).text
    assert "no case was measured" in text and "nothing to draw" in text


def in_browser(text: str, folder: Path, *options: str) -> tuple[str, str]:
    """The page's elements after its scripts ran, and what the browser logged."""
    if CHROMIUM is None:
        pytest.skip("no chromium here; apt-get install chromium")
    path = folder / "page.html"
    path.write_text(text, encoding="utf-8")
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *("--v=0", "--disable-background-networking", "--no-first-run", *options),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"),
        *("--virtual-time-budget=20000", "--dump-dom", path.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


def test_charts_are_drawn_in_chromium(good: str, tmp_path: Path) -> None:
    dom, log = in_browser(good, tmp_path)
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
    charts = re.findall(r'data-figure="([^"]+)"[^>]*>\s*<svg', dom)
    assert len(charts) == len(figures(digest([h100_run()])))
    assert ">This chart could not be drawn" not in dom
    assert "95 of 95 cases" in dom


def test_hostile_page_runs_nothing_in_chromium(hostile: str, tmp_path: Path) -> None:
    dom, log = in_browser(hostile, tmp_path)
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
    assert "onerror" not in {name for _, attributes in Page(dom).elements for name in attributes}
    assert dom.count("<svg") >= 5
