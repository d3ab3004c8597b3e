"""The page in a real Chromium: every control, several tabs, wrong files, reloads, and nothing from elsewhere."""

import json
import re
import shutil
import socket
import threading
import time

import pytest
from PIL import Image

from dyvte_engine import EXAMPLES
from dyvte_engine.inspect.run import Settings

from .conftest import PICTURE, QUESTION, SHIPPED

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("gradio", minversion="6.31", reason="pip install 'dyvte-engine[inspect]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="the tests of the page need playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("the tests of the page need Chromium in PATH: apt-get install chromium", allow_module_level=True)

expect = sync_api.expect
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def elsewhere():
    """Hosts other than this machine that anything in this process has looked up."""
    asked, plain = [], socket.getaddrinfo

    def watched(host, *args, **options):
        if host not in (None, "127.0.0.1", "localhost", "0.0.0.0"):
            asked.append(host)
        return plain(host, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", watched)
        yield asked


@pytest.fixture(scope="module")
def address(inspector, elsewhere):
    from dyvte_engine.inspect.app import create_app

    config = uvicorn.Config(create_app(inspector), port=0, log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, address):
    """Opens a tab; whatever it asks of another host, or complains of, fails the test."""
    outside, errors, contexts = [], [], []

    def open_(query="", wide=1280):
        contexts.append(browser.new_context(viewport={"width": wide, "height": 900}, accept_downloads=True))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda r: outside.append(r.url) if _is_outside(r.url, address) else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.goto(address + query)
        expect(page.locator("#ask")).to_be_visible()
        return page

    yield open_
    for context in contexts:
        context.close()
    assert (outside, errors) == ([], [])


@pytest.fixture
def page(opened):
    return opened()


def _is_outside(url, address):
    return not url.startswith((address, "data:", "blob:"))


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def box(page, name):
    return page.locator(f"#{name} :is(input, textarea)").first


def answered(page, text):
    """The answer is complete and measured."""
    expect(page.locator("#answer .dy-words")).to_have_text(text)
    expect(page.locator("#savings")).to_contain_text("Prefill time")


def ask(page, question=None):
    if question is not None:
        box(page, "question").fill(question)
    page.click("#ask")


# What gradio mounts at the first visit of a tab; one frame later it writes their first values once more.
_MOUNTED = {
    "Compare": ("policies", "run-compare", "comparison"),
    "Ask again": ("again", "turns"),
    "Batch": ("batch-question", "batch-files", "batch-folder", "run-batch", "batch"),
}
_THREE_FRAMES = "() => new Promise(done => { let n = 3; (function f() { n-- ? requestAnimationFrame(f) : done() })() })"


def tab(page, name):
    page.get_by_role("tab", name=name).click()
    for part in _MOUNTED.get(name, ()):
        page.locator(f"#{part}").wait_for(state="attached")
    page.evaluate(_THREE_FRAMES)


def said(inspector, policy="auto", threshold=None, question=QUESTION, picture=PICTURE):
    return inspector.engine.generate(
        question, picture, policy=inspector.policy(policy, threshold), max_new_tokens=64, do_sample=False
    )


def test_a_question_is_answered_with_all_that_is_to_see(page, inspector):
    want = said(inspector)
    ask(page)
    answered(page, want.text.strip())
    chip = f"the picture leaves after layer {want.stats.exit_layer}"
    expect(page.locator("#answer")).to_contain_text(chip)
    rows = ", ".join(map(str, want.stats.tokens_per_layer))
    assert rows in page.locator("#layers svg").first.get_attribute("aria-label")
    assert page.locator("#layers .dy-heads circle.dy-dot").count() == 11
    expect(page.locator("#heat")).to_contain_text("Layer 2.")
    assert page.locator(".dy-veil").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [12, 12]
    veil = page.locator(".dy-veil").get_attribute("src")
    box(page, "layer").fill("9")
    box(page, "layer").press("Enter")
    expect(page.locator("#heat")).to_contain_text("if it had stayed")
    assert page.locator(".dy-veil").get_attribute("src") != veil
    for kind, check in (("json", lambda b: json.loads(b)["answer"] == want.text), ("png", _is_png)):
        with page.expect_download() as saving:
            page.click(f"#save-{kind}")
        assert saving.value.suggested_filename == f"dyvte-inspect.{kind}"
        assert check(saving.value.path().read_bytes())


def _is_png(data):
    return data[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_threshold_can_be_dragged_typed_and_reset(page, inspector):
    ask(page)
    answered(page, said(inspector).text.strip())
    line, area = page.locator(".dy-grip").bounding_box(), page.locator(".dy-heads svg").bounding_box()
    page.mouse.move(line["x"] + 60, line["y"] + line["height"] / 2)
    page.mouse.down()
    page.mouse.move(line["x"] + 60, area["y"] + area["height"] * 0.6, steps=4)
    page.mouse.up()
    dragged = float(box(page, "threshold").evaluate("slider => 1 / (1 + Math.exp(-slider.value))"))
    assert 0.1 < dragged < 0.9
    early = said(inspector, threshold=dragged)
    assert early.stats.exit_layer < said(inspector).stats.exit_layer
    expect(page.locator("#answer")).to_contain_text(f"after layer {early.stats.exit_layer}")
    page.get_by_label("threshold, exactly").fill("0.97")
    page.get_by_label("threshold, exactly").press("Enter")
    typed = said(inspector, threshold=0.97)
    expect(page.locator("#answer")).to_contain_text(f"after layer {typed.stats.exit_layer}")
    expect(page.locator("#link textarea, #link input")).to_have_value(re.compile("threshold=0.97"))
    page.get_by_role("button", name="as calibrated").click()
    expect(page.locator("#answer")).to_contain_text(f"after layer {said(inspector).stats.exit_layer}")
    assert float(page.get_by_label("threshold, exactly").input_value()) == pytest.approx(
        inspector.threshold("auto"), abs=1e-5
    )


def test_a_link_opens_what_it_says(opened, inspector):
    first = opened(
        f"?example={PICTURE.stem}&question=what+shapes+are+there%3F&policy=dynamic:auto&threshold=0.9&layer=4"
    )
    want = said(inspector, threshold=0.9, question="what shapes are there?")
    answered(first, want.text.strip())
    expect(first.locator("#heat")).to_contain_text("Layer 4.")
    assert box(first, "policy").input_value() == "dynamic:auto"
    link = box(first, "link").input_value()
    assert "threshold=0.9" in link and link == first.url
    second = opened("?" + link.partition("?")[2])
    answered(second, want.text.strip())
    bad = opened("?threshold=high")
    expect(bad.locator("#problem")).to_contain_text("threshold in the link is 'high'")


def test_policies_compared(page, inspector):
    tab(page, "Compare")
    box(page, "policies").fill("keep-all\nauto\nfixed:0\nmaybe")
    page.click("#run-compare")
    lines = page.locator("#comparison tbody tr")
    expect(lines).to_have_count(4)
    answers = [said(inspector, policy).text.strip() for policy in ("keep-all", "auto", "fixed:0")]
    for i, answer in enumerate(answers):
        expect(lines.nth(i)).to_contain_text(answer)
        expect(lines.nth(i).locator(".dy-differs")).to_have_count(int(answer != answers[0]))
    expect(lines.nth(3)).to_contain_text("policy 'maybe' is not understood")


def test_asking_again_shows_what_was_known(page):
    ask(page, "is there a circle?")
    expect(page.locator("#savings")).to_contain_text("Prefill time")
    tab(page, "Ask again")
    box(page, "again").fill("how many circles?")
    box(page, "again").press("Enter")
    expect(page.locator(".dy-turn")).to_have_count(2)
    expect(page.locator(".dy-turn").first).to_contain_text("how many circles?")
    expect(page.locator(".dy-turn").first).to_contain_text("rows were known, in 12 of 12 layers")
    assert page.locator(".dy-turn").first.locator("rect.dy-reused").count() > 0


def test_a_batch_with_a_wrong_file(page, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    tab(page, "Batch")
    page.click("#run-batch")
    expect(page.locator("#problem")).to_contain_text("pictures are missing")
    box(page, "batch-question").fill("what color is the shape?")
    page.set_input_files("#batch-files input[type=file]", [EXAMPLES / e["file"] for e in SHIPPED[:3]] + [bad])
    expect(page.locator("#batch-files")).to_contain_text("bad")
    page.click("#run-batch")
    expect(page.locator("#batch tbody tr")).to_have_count(4)
    expect(page.locator("#batch tbody tr").last).to_contain_text("picture bad.png: it is not a readable picture")
    layers = page.locator("#batch td[data-name='picture leaves']").all_inner_texts()
    assert layers == sorted(layers, key=lambda text: int(text.split()[-1]))
    page.set_input_files("input:has(+ #batch-folder)", EXAMPLES)
    expect(page.locator("#batch-files")).to_contain_text("8_presence")


def test_wrong_files_policies_and_questions_are_refused_in_words(page, inspector, tmp_path):
    wrong, huge = tmp_path / "wrong.png", tmp_path / "huge.png"
    wrong.write_text("no picture")
    Image.new("1", (20000, 20000)).save(huge)
    for file, words in ((wrong, "not a readable picture"), (huge, "too large")):
        upload(page, file)
        ask(page)
        expect(page.locator("#problem")).to_contain_text(words)
    page.locator("#examples button").first.click()
    answered(page, said(inspector).text.strip())
    expect(page.locator("#problem")).not_to_be_visible()
    ask(page, " ")
    expect(page.locator("#problem")).to_contain_text("question is empty")
    box(page, "policy").fill("maybe")
    box(page, "policy").press("Enter")
    expect(page.locator("#problem")).to_contain_text("policy 'maybe' is not understood")
    expect(page.locator(".dy-slider")).to_have_count(0)


def upload(page, file):
    """In place of the picture that is there."""
    page.get_by_role("button", name="Remove Image").click()
    page.set_input_files("#picture input[type=file]", file)
    expect(page.locator(f"#picture img[src*='{file.name}']")).to_have_count(1)


def test_an_uploaded_picture_is_answered_and_not_in_the_link(page, tmp_path):
    own = tmp_path / "own.png"
    Image.new("RGB", (200, 120), "red").save(own)
    upload(page, own)
    ask(page)
    expect(page.locator("#savings")).to_contain_text("Prefill time")
    expect(page.locator("#note")).to_contain_text("uploaded picture cannot be in a link")
    assert "?" not in page.url


def test_two_tabs_have_their_own_runs(opened, inspector):
    first, second = opened(), opened()
    ask(first)
    ask(second, "is there a star?")
    answered(second, said(inspector, question="is there a star?").text.strip())
    answered(first, said(inspector).text.strip())
    box(first, "layer").fill("5")
    box(first, "layer").press("Enter")
    expect(first.locator("#heat")).to_contain_text("Layer 5.")
    expect(second.locator("#heat")).to_contain_text("Layer 2.")
    tab(second, "Ask again")
    expect(second.locator(".dy-turn")).to_have_count(1)
    expect(second.locator(".dy-turn")).to_contain_text("is there a star?")


@pytest.mark.parametrize("how", ["reload", "stop"])
def test_an_answer_that_nobody_waits_for_any_more_ends(page, inspector, monkeypatch, how):
    endless = property(lambda self: dict(max_new_tokens=1700, min_new_tokens=1700, do_sample=False))
    monkeypatch.setattr(Settings, "options", endless)
    ask(page)
    expect(page.locator("#answer .dy-words")).to_contain_text("blue")
    assert inspector.engine.load["running"] == 1
    if how == "reload":
        page.reload()
        expect(page.locator("#answer")).to_contain_text("Choose a picture")
    else:
        page.click("#stop")
        expect(page.locator(".dy-caret")).to_have_count(0)
    until(lambda: inspector.engine.load["running"] == 0, 20)
    monkeypatch.undo()
    ask(page)
    answered(page, said(inspector).text.strip())


def test_without_a_mouse(page, inspector):
    def focus(inside, limit=40):
        for _ in range(limit):
            page.keyboard.press("Tab")
            if page.evaluate("inside => document.activeElement.closest(inside) !== null", inside):
                return
        raise AssertionError(f"Tab never reaches {inside}")

    focus("#examples")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    second = said(inspector, question=SHIPPED[1]["prompt"], picture=EXAMPLES / SHIPPED[1]["file"])
    answered(page, second.text.strip())
    focus("#question")
    page.keyboard.press("Control+a")
    page.keyboard.type("is there a star?")
    page.keyboard.press("Enter")
    asked = dict(question="is there a star?", picture=EXAMPLES / SHIPPED[1]["file"])
    answered(page, said(inspector, **asked).text.strip())
    focus("#threshold input[type=range]")
    for _ in range(3):
        page.keyboard.press("PageDown")
    value = page.evaluate("Number(document.querySelector('#threshold input[type=number]').value)")
    assert value < inspector.threshold("auto")
    layer = said(inspector, threshold=value, **asked).stats.exit_layer
    expect(page.locator("#answer")).to_contain_text(f"after layer {layer}")
    focus("#layer input[type=range]")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#heat")).to_contain_text("Layer 3.")


def test_a_phone_shows_all_of_it_without_scrolling_sideways(opened):
    page = opened(wide=390)
    ask(page)
    expect(page.locator("#savings")).to_contain_text("Prefill time")
    for name in ("Look inside", "Compare", "Ask again", "Batch"):
        tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_browser_itself_refuses_other_hosts_and_nothing_was_asked_of_them(page, elsewhere):
    fetched = page.evaluate("fetch('http://192.0.2.1/').then(() => 'fetched', () => 'refused')")
    assert fetched == "refused"
    assert elsewhere == []
