"""The studio in a real browser: each view does its work, on a desk and on a phone, by keyboard alone."""

import io
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import uvicorn
from PIL import Image
from studio_models import make_models, make_results

from lexel.studio import Library, codebook, make_app

CHROMIUM = os.environ.get("LEXEL_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; install it, or name it in LEXEL_CHROMIUM"),
]
ARGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SIZES = {"desk": (1200, 900), "phone": (390, 844)}
PATIENCE = 60_000  # milliseconds
KEPT = os.environ.get("LEXEL_STUDIO_VIEWS")  # a folder for screenshots of every view at each size, to be looked at


@contextmanager
def served(app) -> Iterator[str]:
    """The address of an application that a thread serves."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """A studio over small models."""
    models, results = make_models(tmp_path_factory.mktemp("models")), make_results(tmp_path_factory.mktemp("results"))
    with served(make_app(Library([models, *results]))) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGS.split())
        yield opened
        opened.close()


class Visitor:
    """A browser window of its own; faults of the page's scripts and requests to elsewhere are kept."""

    def __init__(self, browser, address, size="desk"):
        width, height = SIZES[size]
        self.context = browser.new_context(viewport={"width": width, "height": height}, has_touch=size == "phone")
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.address, self.faults, self.elsewhere, self.opened = address, [], [], 0
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", self._note)

    def _note(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def open(self, view):
        """Reads the page anew; another query, not another site, so that Chromium keeps the process of its window."""
        self.opened += 1
        self.page.goto(f"{self.address}?{self.opened}#{view}")
        return self.page


@pytest.fixture(scope="module")
def gone(browser) -> dict[str, list[Visitor]]:
    """Visitors by size whose window another test may use: the studio keeps nothing in a browser but the address."""
    return {size: [] for size in SIZES}


@pytest.fixture
def visit(browser, address, gone):
    visitors = []

    def arrive(size="desk"):
        visitors.append((size, gone[size].pop() if gone[size] else Visitor(browser, address, size)))
        return visitors[-1][1]

    yield arrive
    for size, visitor in visitors:
        stored = visitor.page.evaluate("[localStorage.length, sessionStorage.length, document.cookie.length]")
        assert (visitor.faults, visitor.elsewhere, stored) == ([], [], [0, 0, 0])
        gone[size].append(visitor)


DONE = {  # a view, and what is there once it has done its work
    "reconstruct?with=b": ".wipe img",
    "tokens": ".grid canvas",
    "codebook": ".codes button",
    "generate": "button.main",
    "training": ".chart svg",
    "results": "table.results",
}


@pytest.mark.parametrize("view", DONE)
def test_a_view_does_its_work_and_fits_the_screen(visit, view):
    page = visit("phone").open(view)
    page.locator(DONE[view]).first.wait_for()
    assert not page.locator("#message").is_visible()
    named = "e => e.labels?.length || e.ariaLabel || e.title || e.textContent.trim()"
    assert page.evaluate(f"[...document.querySelectorAll('button, input, select')].every({named})")
    for size in ("desk", "phone"):  # the window of the next test is a phone's again
        width, height = SIZES[size]
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wide = page.evaluate("Math.min(...[...document.querySelectorAll('figure .grid')].map(e => e.clientWidth), 999)")
        assert wide > 250  # to be painted with a finger
        last = page.locator("#views a").last.bounding_box()
        assert last["x"] + last["width"] <= width
        if KEPT:
            page.screenshot(path=Path(KEPT) / f"{view.split('?')[0]}-{size}.png", full_page=True)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def choose(page, name, data, kind):
    page.locator("input[type=file]").first.set_input_files({"name": name, "mimeType": kind, "buffer": data})


def test_a_picture_is_reconstructed_and_a_wrong_file_gets_a_sentence(visit):
    page = visit().open("reconstruct?whole=1")
    page.locator(".wipe img").first.wait_for()
    choose(page, "red.png", png(), "image/png")
    page.get_by_text("50 × 40").first.wait_for()
    choose(page, "notes.txt", b"not a picture", "text/plain")
    page.locator("#message").wait_for()
    assert page.locator("#message").inner_text().startswith("the picture cannot be read")
    choose(page, "red.png", png(), "image/png")  # and the studio goes on
    page.locator("#message").wait_for(state="hidden")


def test_a_picture_above_the_limit_is_refused_before_it_is_sent(visit):
    page = visit().open("reconstruct")
    page.locator(".wipe img").first.wait_for()
    page.evaluate("import('/static/lib.js').then(lib => lib.studio()).then(s => { s.limits.bytes = 10; })")
    choose(page, "red.png", png(), "image/png")
    page.locator("#message").wait_for()
    assert "the limit is 10" in page.locator("#message").inner_text()


def changed(page, count):
    page.locator("[data-changed]").wait_for(state="attached")
    shown = page.locator("[data-changed]")
    expect = pytest.importorskip("playwright.sync_api").expect
    expect(shown).to_have_attribute("data-changed", str(count), timeout=20_000)


def test_tokens_are_painted_and_undone_by_keyboard_alone(visit):
    page = visit().open("")
    page.locator(".wipe img").first.wait_for()
    page.keyboard.press("2")  # the second view
    canvas = page.locator(".grid canvas")
    canvas.wait_for()
    for _ in range(60):  # to the grid, as a keyboard gets there
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "CANVAS":
            break
    assert page.evaluate("document.activeElement.tagName") == "CANVAS"
    before = page.locator("img[alt='The picture of these tokens']").get_attribute("src")
    page.keyboard.press("ArrowRight")
    near = page.locator(".codes.small button").first
    near.wait_for()
    near.focus()
    page.keyboard.press("Enter")  # picks the nearest code
    canvas.focus()
    page.keyboard.press("Enter")  # paints it
    changed(page, 1)
    page.wait_for_function(
        "before => document.querySelector(\"img[alt='The picture of these tokens']\").src !== before", arg=before
    )
    assert "edits=1." in page.url
    page.keyboard.press("Control+z")
    changed(page, 0)


WORKED = {  # a view's key, what is reached by Tab and entered, and what is there then
    "1": (".examples [aria-label='Example 2']", ".examples [aria-label='Example 2'][aria-pressed='true']"),
    "3": (".codes button", ".about h2"),
    "4": ("button.main", ".samples img"),
    "6": ("table.results button", "table.results [aria-sort$='cending']"),
    "5": ("input[type=checkbox]", "input[type=checkbox]:not(:checked)"),  # the last: an input takes keys
}


def test_every_view_is_opened_and_used_by_keyboard_alone(visit):
    page = visit().open("tokens")
    page.locator(".grid canvas").wait_for()
    for key, (reached, found) in WORKED.items():
        page.keyboard.press(key)
        page.locator(reached).first.wait_for()
        assert page.locator(found).count() == 0, key
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate("which => document.activeElement.matches(which)", reached):
                break
        page.keyboard.press("Space" if key == "5" else "Enter")
        page.locator(found).first.wait_for()


def other_codes(address, *places: int) -> list[int]:
    """For each place a code of its own that the tokens of the first example have at none of these places."""
    answer = urlopen(Request(f"{address}api/models/a/reconstruct?example=0", method="POST"), timeout=30)
    tokens = json.load(answer)["indices"]
    return [code for code in range(16) if code not in {tokens[place] for place in places}][: len(places)]


def test_two_tokens_are_swapped_with_the_pointer(visit, address):
    visitor = visit()
    first, last = other_codes(address, 0, 15)  # so that they differ, and each from what it was
    page = visitor.open(f"tokens?edits=0.{first}_15.{last}")
    changed(page, 2)
    page.get_by_role("button", name="Swap two").click()
    box = page.locator(".grid canvas").bounding_box()
    page.mouse.click(box["x"] + 5, box["y"] + 5)
    page.mouse.click(box["x"] + box["width"] - 5, box["y"] + box["height"] - 5)
    page.wait_for_function(f"location.hash.includes('0.{last}_15.{first}')")


def test_an_address_shows_another_person_the_same(visit):
    one, other = visit(), visit("phone")
    page = one.open("codebook?order=number&code=5")
    page.get_by_role("heading", name="Code 5").wait_for()
    page = other.open(page.url.split("#")[1])
    page.get_by_role("heading", name="Code 5").wait_for()


def test_two_visitors_edit_at_once(visit, address):
    third, fourth, fifth = other_codes(address, 3, 4, 5)
    one, other = visit().open(f"tokens?edits=3.{third}"), visit().open(f"tokens?edits=4.{fourth}_5.{fifth}")
    changed(one, 1)
    changed(other, 2)
    one.get_by_role("button", name="Reset").click()
    changed(one, 0)
    changed(other, 2)


def test_a_picture_is_completed_from_its_upper_half(visit):
    page = visit().open("generate?class=1")
    page.get_by_role("button", name="Example 1").first.click()
    page.get_by_text("8 of 16 tokens are made anew").wait_for()
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("done in").wait_for()
    assert page.locator(".samples img").count() == 4


def test_runs_are_laid_over_each_other_and_a_collapse_is_told(visit):
    page = visit().open("training?runs=run")
    page.locator(".finding.problem").first.wait_for()
    page.locator(".strip img").first.wait_for()


def test_results_sort_by_a_click_and_stand_apart_where_they_cannot_be_compared(visit):
    page = visit().open("results")
    page.get_by_text("Not beside the first table").wait_for()
    assert page.locator("section > .scroll > table").count() == 3  # two scales and a comparison
    first = page.locator("section > .scroll > table").first
    assert first.locator("tbody th").all_inner_texts() == ["small", "large"]
    first.get_by_role("button", name="PSNR").click()
    assert first.locator("tbody th").all_inner_texts() == ["large", "small"]
    assert "21.25" in first.locator(".best").first.inner_text()


def test_long_work_shows_progress_and_can_be_stopped(visit, monkeypatch):
    def slow(entry, page, book, order, job):
        for done in range(1000):
            job.progress(done, 1000)
            time.sleep(0.05)

    monkeypatch.setattr(codebook, "page", slow)
    page = visit().open("codebook")
    page.locator("#working progress").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator("#working").wait_for(state="hidden")
    assert page.locator("#message").inner_text() == "stopped"


def test_a_code_chosen_on_a_phone_comes_into_view(visit):
    page = visit("phone").open("codebook")
    page.get_by_label("Map of codes and latents").wait_for()
    page.locator(".codes button").first.click()
    page.wait_for_function(
        """() => {
          const top = document.querySelector(".about h2")?.getBoundingClientRect().top ?? -1;
          return top >= 0 && top < innerHeight;
        }"""
    )


@pytest.mark.skipif("LEXEL_STUDIO_PICTURE" not in os.environ, reason="draws docs/studio.png from runs/demo when asked")
def test_the_picture_in_the_documents_is_drawn(browser):
    """LEXEL_STUDIO_PICTURE=docs/studio.png python -m pytest tests/test_studio_browser.py -k picture_in_the_documents"""
    app = make_app(Library(["runs/demo"]))
    with served(app) as address:
        page = Visitor(browser, address).open("reconstruct?with=vq&example=6")
        page.locator(".wipe img").first.wait_for()
        page.wait_for_load_state("networkidle")
        target = os.environ["LEXEL_STUDIO_PICTURE"]
        page.screenshot(path=target, clip={"x": 0, "y": 0, "width": 1200, "height": 1150}, full_page=True)
        assert Path(target).stat().st_size < 300_000
