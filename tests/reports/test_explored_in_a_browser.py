"""Pages that are explored, and the live page, driven in a real browser: by keyboard, by mouse, on a phone.

axe-core is taken from ``node_modules`` (``npm install --no-save axe-core`` in the repository), or from the
file that ``FEDLOOM_AXE`` names; without it what it would find is not looked for.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fedloom
import screenshots
from fedloom.experiment.experiment import Experiment
from fedloom.reports.live_server import LivePage
from fedloom.reports.run_page import write_report
from fedloom.settings.toml import write_toml
from live_records import append, begin
from screenshots import SCHEMES, WIDTHS, Browser

CHROMIUM = screenshots.browser()
AXE = Path(
    os.environ.get("FEDLOOM_AXE") or Path(__file__).parents[2] / "node_modules/axe-core/axe.min.js"
)
ADDRESS = re.compile(r"live page: (http://127\.0\.0\.1:\d+/[\w-]+/)")
READ = "document.querySelector('.values').textContent"
STATUS = "document.getElementById('status').textContent"
FOCUS = "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]


@pytest.fixture(scope="module")
def window():
    with Browser(CHROMIUM) as opened:
        yield opened


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    """The folder of a run of 100 clients: three rounds, some left out, some away."""
    folder = begin(tmp_path_factory.mktemp("live") / "hundred", clients=100, rounds=20)
    gone = {"client": 7, "name": "client 7", "since": "2026-01-01", "reason": "no connection"}
    bad = {"client": 9, "name": "client 9", "reason": "<img src=x onerror=alert(1)> not finite"}
    for number in range(4):
        each = {client: 0.5 + number * client / 1000 for client in range(100)}
        away = {"absent": [gone], "rejected": [bad]} if number == 2 else {}
        append(folder, number, each, **away)
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory, model_folder):
    """The page of two small runs that are compared, and the folders."""
    folder = tmp_path_factory.mktemp("reports")
    table = screenshots.with_clients(str(model_folder), 3)
    for name, seed in (("one", 0), ("two", 1)):
        own = {**table, "federation": {**table["federation"], "seed": seed}}
        own["output"] = {"folder": str(folder / name), "verify": False}
        fedloom.run(Experiment.from_table(own))
    return write_report([folder / "one", folder / "two"], folder / "page.html")


def tab_to(window, words, most=80):
    """Press Tab until what has the focus is named so."""
    for _ in range(most):
        window.press("Tab")
        if words in (window.value(FOCUS) or ""):
            return
    raise AssertionError(f"Tab does not reach {words}")


def serious(window):
    """What axe-core finds that is serious or worse, as sentences."""
    if not AXE.is_file():
        return []
    window.value(AXE.read_text() + "; 0")
    window.value(
        "axe.run(document, {resultTypes: ['violations']})"
        ".then((own) => { window.found = {all: own.violations}; }); 0"
    )
    window.until("window.found", 60)
    said = window.value(
        "JSON.stringify(window.found.all.filter((own) => ['serious', 'critical'].includes(own.impact))"
        ".map((own) => `${own.id}: ${own.nodes.map((node) => node.html).slice(0, 3).join(' | ')}`))"
    )
    return json.loads(said)


def test_by_keyboard_alone_values_are_read_and_lines_and_ranges_chosen(window, report):
    window.show(report, 1280, "light")
    tab_to(window, "read values of: Held-out")
    assert window.value(READ).startswith("round 3 \u2013 one: ")
    window.press("ArrowLeft")
    assert window.value(READ).startswith("round 2 \u2013 one: ")
    window.press("Home")
    before = window.value(READ)
    assert before.startswith("round 0 \u2013 one: ") and "two: " in before and " to " in before
    tab_to(window, "two")
    window.press("Space")
    assert window.value("document.activeElement.getAttribute('aria-pressed')") == "false"
    assert "two: " not in window.value(READ)
    assert window.value("location.hash") == "#hide=two"
    tab_to(window, "Range, download")
    window.press("Enter")
    window.press("Tab", "1", "Tab", "2", "Tab")
    slug = window.value("charts.all[0].slug")
    assert window.value("location.hash") == f"#hide=two&from.{slug}=1&to.{slug}=2"
    shown = window.value("[charts.all[0].xs, charts.all[0].found.map((own) => own.at)]")
    assert shown == [[1, 2], [1, 2]]
    assert window.value("charts.all[1].lines().map((own) => own.name)") == [
        "one"
    ]  # on the whole page


def test_an_address_shows_the_same_again(window, report):
    window.show(report, 1280, "light")
    slug = window.value("charts.all[0].slug")
    again = f"{report.resolve().as_uri()}#hide=one&from.{slug}=1"
    window.show("about:blank", 1280, "light")
    window.show(again, 1280, "light")
    assert window.value("charts.all[0].lines().map((own) => own.name)") == ["two"]
    assert window.value("charts.all[0].xs[0]") == 1
    assert window.value("charts.all[0].ends[0].value") == "1"


@pytest.mark.parametrize(
    "broken",
    [
        *("from.x=NaN", "hide=", "hide=%ff", "from.SLUG=abc&to.SLUG=-5", "&&=&"),
        "from.SLUG=9007199254740992&to.SLUG=9007199254740996",
    ],
)
def test_an_address_that_means_nothing_shows_everything(window, report, broken):
    window.show(report, 1280, "light")
    slug = window.value("charts.all[0].slug")
    window.show("about:blank", 1280, "light")
    window.show(f"{report.resolve().as_uri()}#{broken.replace('SLUG', slug)}", 1280, "light")
    assert window.value("charts.all[0].lines().length") == 2
    assert window.value("charts.all[0].xs[0] < charts.all[0].xs[1]")


def test_by_mouse_values_are_shown_and_a_range_drawn(window, report):
    window.show(report, 1280, "light")
    x, y, width = window.value(
        "(() => { const own = charts.all[0].picture.getBoundingClientRect(); "
        "return [own.left, own.top + own.height / 2, own.width]; })()"
    )
    window.mouse("mouseMoved", x + width * 0.2, y)
    assert window.value(READ).startswith("round 0")
    window.mouse("mousePressed", x + width * 0.5, y, held=True)
    window.mouse("mouseMoved", x + width * 0.8, y, held=True)
    window.mouse("mouseReleased", x + width * 0.95, y, held=True)
    low, high = window.value("charts.all[0].xs")
    assert 0.5 < low < 2 < high < 3.2 and "from.held-out" in window.value("location.hash")
    window.value("charts.all[0].range(null, null); 0")
    assert window.value("location.hash") == ""


def test_a_figure_is_saved_as_a_picture_and_as_its_numbers(window, report):
    window.show(report, 1280, "dark")
    window.value(
        "window.saved = []; URL.createObjectURL = (own) => { own.text().then((t) => saved.push(t)); "
        "return 'about:blank#'; }; HTMLAnchorElement.prototype.click = () => {}; "
        "for (const text of ['SVG', 'CSV']) [...charts.all[0].tools.querySelectorAll('button')]"
        ".find((own) => own.textContent === text).click(); 0"
    )
    window.until("saved.length === 2")
    picture, numbers = sorted(window.value("saved"))  # "<" comes before "l"
    assert picture.startswith("<svg") and "var(--" not in picture and ">one<" in picture
    rows = [line.split(",") for line in numbers.splitlines()]
    assert rows[0] == ["line", "round", "preference accuracy", "low", "high"]
    assert [row[:2] for row in rows[1:]] == [
        [run, str(i)] for run in ("one", "two") for i in range(4)
    ]
    assert rows[1][2] == "0.5"


def test_without_scripts_and_on_paper_the_drawn_figures_are_there(window, report):
    window.show(report, 1280, "light")
    window._ask("Emulation.setEmulatedMedia", media="print")
    try:
        shown = "[...document.querySelectorAll('%s')].filter((own) => own.getClientRects().length).length"
        open_ones = window.value(shown % "figure > svg.paper")
        assert open_ones >= 3
        assert window.value(shown % "svg.drawn") == window.value(shown % ".tools") == 0
    finally:
        window._ask("Emulation.setEmulatedMedia", media="")
    assert len(re.findall(r"<svg role=\"img\"", report.read_text())) >= open_ones


def test_a_hundred_clients_at_every_width_light_and_dark(window, hundred):
    with LivePage(hundred.path) as page:
        for width in WIDTHS:
            for scheme in SCHEMES:
                window.show(page.address, width, scheme)
                window.until("document.querySelectorAll('svg.drawn').length >= 5")
                assert window.faults() == []
                assert serious(window) == []
        assert window.value("document.querySelectorAll('#clients tr').length") == 50
        lines = "charts.all.find((own) => own.title.startsWith('Accuracy of')).spec.lines.map((l) => l.name)"
        assert window.value(lines)[-1] == "mean of the worst tenth"  # and no client's curve
        assert "onerror=alert(1)" in window.value("document.getElementById('events').textContent")
        assert window.value("document.querySelectorAll('#events img, #clients img').length") == 0


def test_by_keyboard_a_client_is_found_and_its_curve_drawn(window, hundred):
    with LivePage(hundred.path) as page:
        window.show(page.address, 390, "light")
        window.until("document.querySelectorAll('#clients tr').length === 50")
        window.value("document.getElementById('find').focus()")
        window.press("4", "2")
        assert window.value("document.querySelectorAll('#clients tr').length") == 1
        tab_to(window, "curves of client 42")
        window.press("Space")
        lines = "charts.all.find((own) => own.title.startsWith('Accuracy of')).spec.lines.map((l) => l.name)"
        window.until(f"({lines}).includes('client 42')")
        address = window.value("location.href")
        assert "find=42" in address and "client=42" in address
        window.show("about:blank", 390, "light")
        window.show(address, 390, "light")
        window.until(f"charts.all.length > 2 && ({lines}).includes('client 42')")


def test_pages_of_runs_have_no_serious_findings(window, report):
    for width in WIDTHS:
        window.show(report, width, "light")
        assert serious(window) == []


def start(*words):
    """Start a command, and return it with the address that it prints."""
    own = subprocess.Popen(
        [sys.executable, "-m", "fedloom", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in own.stdout:
        if found := ADDRESS.search(line):
            return own, found[1]
    raise AssertionError(own.communicate())


def test_a_run_is_killed_and_resumed_while_its_page_is_open(window, tmp_path, model_folder):
    """One page says lost, another one reads on: stopped, running again, finished."""
    folder, file = tmp_path / "run", tmp_path / "experiment.toml"
    table = screenshots.with_clients(str(model_folder), 3)
    table["federation"]["rounds"] = 12
    table["output"] = {"folder": str(folder), "verify": False}
    file.write_text(write_toml(table))
    run, address = start("run", str(file), "--live")
    window.show(address, 390, "dark")
    window.until("/Running; round [1-9]/.test(" + STATUS + ")", 120)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    window.until("document.getElementById('lost').textContent.includes('has ended')", 30)
    other, address = start("watch", str(folder))
    try:
        window.show(address, 390, "dark")
        window.until(STATUS + ".startsWith('Stopped; round')", 30)
        assert "fedloom run --resume" in window.value(STATUS)
        again = subprocess.Popen(
            [sys.executable, "-m", "fedloom", "run", "--resume", str(folder), "-q"],
            stdout=subprocess.DEVNULL,
        )
        window.until(STATUS + ".startsWith('Running; round')", 120)
        assert again.wait(300) == 0
        window.until(STATUS + ".startsWith('Finished; round 12 of 12')", 30)
        shown = window.value("charts.all[0].spec.lines[0].x")
        assert shown == [*range(13)]
        sent = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])
        assert sent["round"] == 12 and window.faults() == []
    finally:
        other.send_signal(signal.SIGTERM)
        other.communicate(timeout=60)
    assert other.returncode == 0
