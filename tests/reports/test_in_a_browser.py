"""What a browser makes of every kind of page: nothing cut off, nothing on top of another, all readable."""

import pytest

import screenshots
from screenshots import SCHEMES, WIDTHS, Browser

CHROMIUM = screenshots.browser()

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]


@pytest.fixture(scope="module")
def window():
    with Browser(CHROMIUM) as opened:
        yield opened


def test_every_kind_of_page_at_every_width_light_and_dark(window, tmp_path, model_folder):
    """Runs of 3, 20 and 200 clients, many values, experts, all comparisons, judges, rows: no fault."""
    made = screenshots.pages(tmp_path, str(model_folder))
    assert len(made) == 12
    found = []
    for name, page in made.items():
        for width in WIDTHS:
            for scheme in SCHEMES:
                window.show(page, width, scheme)
                assert window.value("innerWidth") == width
                found += [f"{name}, {width}, {scheme}: {fault}" for fault in window.faults()]
    assert found == []
    page = made["run-200"]
    window.show(page, 1280, "light")
    shown = (
        "[...document.querySelectorAll('.holdings tr:has(> td)')].filter((r) => !r.hidden).length"
    )
    assert window.value(shown) == 200
    window.value(
        "const f = document.querySelector('.holdings input'); f.value = 'kitchen clinic'; "
        "f.dispatchEvent(new Event('input'))"
    )
    every = "[...document.querySelectorAll('.holdings tr:has(> td)')].map((r) => r.textContent)"
    holds = [all(word in text for word in ("kitchen", "clinic")) for text in window.value(every)]
    assert window.value(shown) == sum(holds) and 0 < sum(holds) < 200


FAULTY = {
    "wide": ('<p style="width: 900px">x</p>', "the page is"),
    "pale": ('<p style="color: #ccc">pale</p>', "contrast 1.6 of pale"),
    "scrolling": (
        '<div class="scroll" style="overflow-x: auto"><table style="width: 2000px"><tr><td>a</td></tr>'
        "</table></div>",
        "the first column scrolls away: a",
    ),
    "text on text": (
        "<figure><figcaption>c</figcaption><svg viewBox='0 0 99 99'><text y='50'>one</text>"
        "<text y='52'>two</text></svg></figure>",
        "c: one lies on two",
    ),
    "legend": (
        "<figure><svg viewBox='0 0 99 99'><g id='axes_1'><g id='patch_2'><rect width='50' height='50'/>"
        "</g></g><g id='legend_1'><rect x='20' y='20' width='9' height='9'/></g></svg></figure>",
        "the legend lies on the data",
    ),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_faults_are_found(window, tmp_path, fault):
    body, said = FAULTY[fault]
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><html><body>{body}</body></html>")
    window.show(page, 390, "light")
    assert any(said in own for own in window.faults())
