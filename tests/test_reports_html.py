"""The page: no network, nothing of a record runs, charts are drawn."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dsa_bench import doubt
from dsa_bench.reports import html
from dsa_bench.reports.details import MAX_SAMPLES, slowed_by, thinned
from dsa_bench.reports.digest import digest
from dsa_bench.reports.figures import figures
from tests.reports_runs import HOSTILE, FakeRun, doubtful_run, h100_run, hostile_run

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
        *("code", "details", "summary", "dl", "dt", "dd", "footer", "script", "ul", "li", "br"),
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
    # every text stands on an ok case and on a failed one
    assert len(details) == 2 * len(HOSTILE)
    kernels = [detail["kernels"] for detail in details.values() if "kernels" in detail]
    assert len(kernels) == len(HOSTILE)
    assert HOSTILE[0] in {row[0] for rows in kernels for row in rows}
    logs = [line for detail in details.values() for line in detail.get("log", ())]
    assert HOSTILE[0] in logs and all(line.isprintable() for line in logs)
    modes = {row[1] for detail in details.values() for row in detail.get("measured", ())}
    assert HOSTILE[0] in modes


def test_page_shows_headline_counts_and_reasons(good: str) -> None:
    text = " ".join(Page(good).text.split())
    assert digest([h100_run()]).headlines[0] in text
    for part in ("87 ok", "2 noisy", "1 wrong", "1 failed", "1 oom", "1 timeout", "2 skipped"):
        assert part in text
    assert "worker died with signal 11 (segmentation fault)" in text
    assert "1K = 1024" in text and "Attention only" in text
    assert "copy_bytes_per_second" in text and "2.11.0+cu130" in text


@pytest.fixture(scope="module")
def doubtful() -> str:
    return html.page(digest([doubtful_run()]))


def data_of(text: str) -> Any:
    return json.loads(next(t for attributes, t in Page(text).scripts if "type" in attributes))


def test_health_adds_up_to_all_cases(doubtful: str) -> None:
    report = digest([doubtful_run()])
    assert report.health == {"ok": 18, "noisy": 1, "suspect": 1, "invalid": 1, "failed": 1}
    assert sum(report.health.values()) == len(report.cases)
    strip = re.search(r'<div class="health".*?</div>', doubtful, re.DOTALL)
    assert strip is not None
    assert re.findall(r'class="is-(\w+)" style="flex-grow: (\d+)"', strip[0]) == [
        (name, str(count)) for name, count in report.health.items()
    ]


def test_page_says_why_a_time_is_in_doubt_and_what_to_do(doubtful: str) -> None:
    row = re.search(r'<tr data-case="[^"]*" class="is-ok" title="(suspect[^"]*)"', doubtful)
    assert row is not None
    assert row[1].startswith("suspect: launch_bound: ") and doubt.hint("launch_bound") in row[1]
    text = " ".join(Page(doubtful).text.split())
    assert text.count(f"✗ {doubt.explain(['below_floor'])}") == 1
    assert "wall 6900 s: 51 % measuring" in text
    assert "Hollow: noisy. Cross, not joined by the line: suspect or invalid." in text


def test_an_open_row_shows_how_it_was_measured(doubtful: str) -> None:
    data = data_of(doubtful)
    found = data["details"].values()
    noisy = next(d for d in found if "drift" in str(d.get("flags")))
    assert noisy["flags"] == [["noisy", doubt.explain(["drift"])]]
    assert [row[0] for row in noisy["measured"]] == ["0", "1", "2"]
    facts = dict(zip(data["measured"], noisy["measured"][1], strict=True))
    assert facts == {
        "process": "1", "mode": "cold", "samples": "100", "visits": "2", "beside": "1 in turn",
        "input sets": "3", "ended by": "settled", "overtaken": "0", "spin": "200 µs",
        "flush": "128 MiB", "event overhead": "2.10 µs", "SM clock": "1972 MHz",
        "highest": "1980 MHz", "power": "650 W", "temperature": "62 °C",
        "slowed by": "power limit, heat (hardware)", "neighbours": "0",
    }  # fmt: skip
    samples = noisy["samples"]
    assert samples["unit"] == "ms" and len(samples["points"]) <= MAX_SAMPLES
    assert {point[2] for point in samples["points"]} == {0, 1, 2}
    failed = next(d for d in data["details"].values() if "log" in d)
    assert failed["log"] == [
        "workers lost over this case: 2",
        "CUDA error: an illegal memory access",
        "<b>worker ended</b>",
    ]


def test_thinned_samples_keep_the_extremes_in_order() -> None:
    seconds = tuple(1.0 + (i == 777) * 5 - (i == 12) * 0.5 for i in range(1000))
    kept = thinned(seconds, 20)
    assert len(kept) <= 20 and kept == sorted(kept)
    assert (777, 6.0) in kept and (12, 0.5) in kept
    assert thinned((1.0, 2.0), 20) == [(0, 1.0), (1, 2.0)]


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        (0, ""),
        (0x08 | 0x80, "hardware slowdown, power brake"),
        (0x1000 | 0x4, "power limit, 0x1000"),
    ],
)
def test_throttle_bits_have_names(bits: int, said: str) -> None:
    assert slowed_by(bits) == said


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


OPEN_EVERY_ROW = """<script>
addEventListener("load", () => {
  const opened = document.createElement("ol");
  for (const row of document.querySelectorAll("tr[data-case]")) {
    row.cells[0].click();
    opened.append(row.nextElementSibling.cloneNode(true));
  }
  document.body.append(opened);
});
</script>"""


def test_rows_open_in_chromium(hostile: str, doubtful: str, tmp_path: Path) -> None:
    for name, text in (("hostile", hostile), ("doubtful", doubtful)):
        (tmp_path / name).mkdir()
        # the policy would forbid the script that opens the rows
        page = re.sub(r"<meta http-equiv[^>]*>", "", text)
        page = OPEN_EVERY_ROW.join(page.rsplit("</body>", 1))
        dom, log = in_browser(page, tmp_path / name)
        assert [line for line in log.splitlines() if "CONSOLE" in line] == []
        assert dom.count('class="detail"') >= text.count("<tr data-case")
        assert "onerror" not in {n for _, attributes in Page(dom).elements for n in attributes}
        assert "slowed by" in dom and "<b>worker" not in dom


def test_hostile_page_runs_nothing_in_chromium(hostile: str, tmp_path: Path) -> None:
    dom, log = in_browser(hostile, tmp_path)
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
    assert "onerror" not in {name for _, attributes in Page(dom).elements for name in attributes}
    assert dom.count("<svg") >= 5
