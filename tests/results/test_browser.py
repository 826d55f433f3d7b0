"""The pages in a real browser: slices, filters, reviews; nothing is fetched, and nothing foreign runs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import browser as browsers
import pytest
from pages import failed, hearts, row_of, write

from monai_deepgmm.results import report, review

HOSTILE = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
#: How many pixels of the first canvas are nearer to a colour than 12 in each channel.
COUNT = """(([r, g, b]) => { const c = document.querySelector('canvas'), d = c.getContext('2d').getImageData(0, 0,
c.width, c.height).data; let n = 0; for (let i = 0; i < d.length; i += 4) n += Math.abs(d[i] - r) < 12 &&
Math.abs(d[i + 1] - g) < 12 && Math.abs(d[i + 2] - b) < 12; return n; })"""
PICTURE = "document.querySelector('canvas').toDataURL()"
WHERE = "document.getElementById('where').textContent"
SHOWN = "document.getElementById('shown').textContent"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hearts and a brain, one of the hearts flagged and with reference labels, and two that failed."""
    folder = tmp_path_factory.mktemp("out")
    write(folder, row_of(hearts("a"), warnings=["W_IMPLAUSIBLE: <b>scar</b> is dark"]), hearts("a"), reference=True)
    write(folder, row_of(hearts("b"), warnings=[], fingerprint="b" * 64), hearts("b"))
    brain = hearts("brain", name="brain", sequences=("T1",))
    write(folder, row_of(brain, warnings=[], fingerprint="c" * 64), brain)
    write(folder, failed("broken"))
    (folder / ".refused").mkdir()
    (folder / ".refused" / "1.json").write_text(json.dumps(failed(HOSTILE, message=HOSTILE)))
    report.rebuild(folder)
    return folder


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browsers.Browser]:
    if browsers.program() is None:
        pytest.skip(f"no browser on the path: {', '.join(browsers.NAMES)}")
    opened = browsers.Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


def url(out: Path, patient: str) -> str:
    return (out / patient / f"{patient}_report.html").as_uri()


def steady(tab: browsers.Browser) -> str:
    """The first canvas with contours; one that is read again and again is drawn by other means from then on."""
    for key in "fcfc":
        tab.key(key)
        picture = tab.run(PICTURE)
    return picture


def test_a_heart_is_looked_through_by_keys_wheel_and_slider(tab, out):
    tab.requests.clear()
    tab.open(url(out, "a"))
    assert tab.run(WHERE).startswith("slice 2 (3 of 5) · 8.0 mm from the first slice · spacing 8.0 mm")
    tab.key("ArrowDown")
    assert tab.run(WHERE).startswith("slice 3")
    tab.key("ArrowDown")
    assert "outside the mask: not segmented" in tab.run(WHERE)
    x, y = tab.run(
        "(b => [b.x + b.width / 2, b.y + b.height / 2])(document.querySelector('canvas').getBoundingClientRect())"
    )
    tab.mouse("mouseWheel", x, y, deltaX=0, deltaY=-100)
    tab.settle()
    assert tab.run(WHERE).startswith("slice 3")
    tab.run("(s => { s.value = 1; s.dispatchEvent(new Event('input')); })(document.getElementById('slice'))")
    tab.settle()
    assert tab.run(WHERE).startswith("slice 1")
    assert tab.run("[...document.querySelectorAll('[data-level][aria-current]')].map(b => b.dataset.level)") == ["1"]
    assert (tab.requests, tab.errors) == ([url(out, "a")], [])


def test_contours_fill_window_and_what_is_shown_beside(tab, out):
    tab.open(url(out, "a"))
    tissues = {t.name: list(bytes.fromhex(t.color[1:])) for t in hearts().tissues}
    seen = {name: tab.run(f"{COUNT}({color})") for name, color in tissues.items()}
    assert min(seen[n] for n in ("blood", "myocardium", "edema")) > 200 > seen["scar"] == 0
    begun = steady(tab)
    tab.key("f")
    assert tab.run(PICTURE) != begun
    tab.key("o")
    alone = tab.run(PICTURE)
    assert tab.run(f"{COUNT}({tissues['blood']})") == 0
    tab.key("c")
    tab.key(" ", "keyDown")
    assert tab.run(PICTURE) == alone  # while space is held
    tab.key(" ", "keyUp")
    assert tab.run(PICTURE) == begun
    for key in "mut":
        tab.key(key)
        assert tab.run(PICTURE) != begun
        tab.key(key)
        assert tab.run(PICTURE) == begun
    tab.drag(300, 500, 60, 20)
    windowed = tab.run(PICTURE)
    assert windowed != begun
    tab.key("2")
    assert steady(tab) not in (begun, windowed)
    tab.key("1")
    assert steady(tab) == windowed  # the window stays with its sequence
    tab.key("s")
    assert tab.run("document.querySelectorAll('canvas').length") == 3
    assert tab.errors == []


def test_a_brain_shows_three_planes_and_a_click_moves_the_cross(tab, out):
    tab.open(url(out, "brain"))
    assert tab.run("document.querySelectorAll('canvas').length") == 3
    before = tab.run(WHERE)
    x, y = tab.run(
        "(b => [b.x + b.width / 4, b.y + b.height / 4])(document.querySelector('canvas').getBoundingClientRect())"
    )
    tab.drag(x, y, 0, 0)
    after = tab.run(WHERE)
    assert [a == b for a, b in zip(before.split(" · "), after.split(" · "), strict=True)] == [True, False, False, True]
    assert tab.errors == []


def test_the_index_filters_sorts_and_back_brings_its_state_back(tab, out):
    tab.open((out / "index.html").as_uri())
    assert tab.run(SHOWN) == "5 of 5"
    names = "[...document.querySelectorAll('td.name')].map(c => c.textContent)"
    assert sorted(tab.run(names)[:2]) == sorted([HOSTILE, "broken"])
    assert tab.run(names)[2] == "a"  # flagged before the others
    assert tab.run("document.title") == "Segmentations"
    tab.run("document.querySelector('[data-show=flagged]').click()")
    assert tab.run(names) == ["a"]
    tab.run("document.querySelector('[data-show=flagged]').click()")
    tab.run("(f => { f.value = '>1'; f.dispatchEvent(new Event('input')); })(document.querySelector('input[data-k]'))")
    assert sorted(tab.run(names)) == ["a", "b"]  # who has blood
    tab.run("document.querySelectorAll('#patients thead button')[0].click()")
    tab.run("document.querySelectorAll('#patients thead button')[0].click()")
    assert tab.run(names) == ["b", "a"]
    tab.run("document.querySelector('td.name a').click()")
    tab.arrive("b_report.html")
    assert tab.run("document.querySelector('h1').textContent") == "b"
    assert tab.run("document.getElementById('previous').getAttribute('href')") == "../brain/brain_report.html"
    tab.run("history.back()")
    tab.arrive("index.html")
    assert (tab.run(names), tab.run(SHOWN)) == (["b", "a"], "2 of 5")
    assert tab.errors == []
    tab.open((out / "index.html").as_uri() + "#broken")
    assert tab.run(names) == ["broken"]


def test_a_review_is_kept_told_and_exported(tab, out, tmp_path):
    tab.open(url(out, "b"))
    said = "document.getElementById('said').textContent"
    assert tab.run(said) == "processed, not reviewed"
    tab.run("document.getElementById('who').value = 'AB'")
    tab.key("n")
    for letter in "apex":
        tab.key(letter)
    tab.key("Enter")
    tab.key("x")
    assert tab.run(said) == "processed, rejected"
    tab.open((out / "index.html").as_uri() + "#show=rejected")
    assert tab.run(
        "[...document.querySelectorAll('#patients tbody tr')].map(r => r.cells[r.cells.length - 1].textContent)"
    ) == ["rejected: apex"]
    tab.run("document.getElementById('export').click()")
    file = tab.downloads / "review.tsv"
    for _ in range(100):
        if file.is_file() and file.read_bytes():
            break
        time.sleep(0.1)
    found = review.read([file])["b"]
    assert (found.decision, found.note, found.reviewer, found.result) == ("reject", "apex", "AB", "b" * 16)
    assert tab.errors == []


@pytest.mark.parametrize("patient", ["a", "brain", None])
def test_nothing_overflows_at_800_pixels_and_print_bears_id_and_disclaimer(tab, out, patient):
    tab.open(url(out, patient) if patient else (out / "index.html").as_uri(), width=800)
    assert tab.run("document.documentElement.scrollWidth") <= 800
    assert len(re.findall(rb"/Type\s*/Page\b", tab.pdf())) <= 2
    tab.send("Emulation.setEmulatedMedia", media="print")
    running = "(r => [getComputedStyle(r).display, r.innerText])(document.querySelector('.running'))"
    display, told = tab.run(running)
    tab.send("Emulation.setEmulatedMedia", media="")
    assert display == "table-header-group"  # which is printed on every sheet
    assert "Research use only, not a medical device" in told
    assert (patient or "Segmentations") in told


@pytest.mark.parametrize("width", [1400, 420])
def test_many_warnings_and_a_narrow_window_do_not_widen_the_index(tab, out, width):
    tab.open((out / "index.html").as_uri(), width=width)
    tab.run("(w => w.innerHTML = w.innerHTML.repeat(12))(document.querySelector('tr.flagged td.w'))")
    assert tab.run("document.documentElement.scrollWidth") <= width
    told = tab.run("[...document.querySelectorAll('.failures tbody td')].map(d => d.getBoundingClientRect().width)")
    assert min(told) > 90  # so that no word stands on several lines
