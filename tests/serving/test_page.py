"""AI写手 in a real browser, with the real server and the shipped model."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from plug.generation.settings import GenerationSettings

PAGE = Path(__file__).resolve().parents[2] / "src" / "plug" / "serving" / "page"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HAS_BROWSER = CHROMIUM is not None and importlib.util.find_spec("playwright") is not None
in_browser = pytest.mark.skipif(
    not HAS_BROWSER, reason='needs Chromium and pip install ".[browser]"'
)
SECONDS = 60_000  # ms, for what usually takes a moment; a machine may be busy


def test_the_page_is_small_and_loads_nothing_from_elsewhere() -> None:
    files = [path for path in PAGE.iterdir() if path.is_file()]
    contents = [path.read_bytes() for path in files]

    assert sum(map(len, contents)) <= 100_000
    assert sum(len(gzip.compress(content)) for content in contents) <= 35_000
    for path in files:
        text = path.read_text(encoding="utf-8")
        links = set(re.findall(r"https?://[^\s\"'<>)]+", text))
        assert links <= {"http://www.w3.org/2000/svg"}, path.name
        if path.suffix == ".html":
            assert not re.search(r"<script(?![^>]*\bsrc=)|\bon\w+=|\bstyle=", text)


def test_all_chinese_of_the_page_has_its_english() -> None:
    words = (PAGE / "words.js").read_text(encoding="utf-8")
    known = set(re.findall(r'"([^"]+)": "', words))
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    shown = set(re.findall(r"data-t(?:-label|-placeholder)=\"([^\"]+)\"", html))
    shown |= set(re.findall(r"data-t>([^<]+)<", html))
    for name in ("app.js", "writer.js", "understand.js"):
        script = (PAGE / name).read_text(encoding="utf-8")
        shown |= set(re.findall(r"\bt\(\"([^\"]+)\"", script))

    assert shown - known == set()


# --- in the browser -------------------------------------------------------------------------------


@contextmanager
def serving(*options: str, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`plug serve` of the shipped model in a process of its own; its address."""
    if not port:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    command = [sys.executable, "-m", "plug", "serve", "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(address + "ready", timeout=1).read()
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.2)
        yield address, process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving() as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Desk:
    """A page of its own, with what a writer does. Complaints of the browser fail the test."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.context = browser.new_context(locale="zh-CN", **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(SECONDS)
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._hear)
        self.page.goto(address)
        # A hidden notice says that the models were asked for and answered.
        self.page.locator("#notice").wait_for(state="hidden")

    def _hear(self, message: Any) -> None:
        # The browser itself logs answers such as 401; the page shows them to the user.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def text(self) -> str:
        return str(self.page.input_value("#text"))

    def open_with(self, opening: str, length: int = 24) -> None:
        self.page.fill("#text", opening)
        self.page.fill("#length", str(length))
        self.page.locator("#length").blur()

    def write(self) -> str:
        """Press the button; what was added when it is done."""
        before = self.text()
        self.page.click("#write")
        self.wait_until_done()
        return self.text().removeprefix(before)

    def wait_until_done(self) -> None:
        self.page.locator("#write:enabled").wait_for()

    def notice(self) -> str:
        return str(self.page.inner_text("#notice"))


@pytest.fixture
def desk(browser: Any, server: str) -> Iterator[Desk]:
    found = Desk(browser, server)
    yield found
    found.context.close()
    assert not found.complaints


OPENING = "却说那日天色将晚，只见山门外走进一个老和尚来，"


@in_browser
def test_writing_going_on_and_what_is_whose(desk: Desk) -> None:
    desk.open_with(OPENING)
    assert desk.page.inner_text("#count") == f"{len(OPENING)} 字"

    first = desk.write()
    second = desk.write()

    assert first
    assert second
    assert desk.text() == OPENING + first + second
    by = desk.page.eval_on_selector_all("#ink .by-model", "all => all.map(e => e.textContent)")
    assert "".join(by) == first + second
    assert desk.page.inner_text("#write") == "接着写"


@in_browser
def test_stopping_keeps_what_was_written(desk: Desk) -> None:
    desk.open_with(OPENING, length=1500)
    desk.page.click("#write")
    desk.page.locator("#ink .by-model:not(:empty)").wait_for()

    desk.page.click("#stop")
    desk.wait_until_done()

    assert len(desk.text()) > len(OPENING)
    assert "已停止" in desk.notice()


@in_browser
def test_another_one_branches_undo_and_a_reload(desk: Desk) -> None:
    desk.open_with(OPENING)
    first = desk.write()
    desk.page.click("#another")
    desk.wait_until_done()
    cards = desk.page.locator(".candidate")
    assert cards.count() == 4  # three new ones, and the one before
    assert cards.nth(3).locator("p").inner_text().strip() == first.strip()
    chosen = cards.nth(1).locator("p").text_content()

    cards.nth(1).locator("button").click()
    assert desk.text() == OPENING + chosen
    desk.page.click("#undo")
    assert desk.text() == OPENING
    desk.page.click("#redo")
    assert desk.text() == OPENING + chosen

    desk.page.click("#history summary")
    desk.page.locator("#tree button").nth(3).wait_for()
    assert (
        desk.page.locator("#tree button").count() == 4
    )  # the beginning, the opening, two branches
    desk.page.locator("#tree button", has_text=f"✎ {first.strip()[:6]}").click()
    assert desk.text() == OPENING + first
    desk.page.wait_for_timeout(1000)  # it is saved
    desk.page.reload()
    desk.page.locator("#ink .by-model").first.wait_for()
    assert desk.text() == OPENING + first
    desk.page.click("#history summary")
    desk.page.locator("#tree button").nth(3).wait_for()  # the beginning, the opening, two branches
    assert desk.page.locator("#tree button").count() == 4


@in_browser
def test_alternatives_of_a_word(desk: Desk) -> None:
    desk.open_with(OPENING)
    desk.write()
    desk.page.focus("#text")
    place = len(OPENING) + 3
    desk.page.eval_on_selector("#text", f"e => e.setSelectionRange({place}, {place})")
    desk.page.keyboard.press("Alt+a")
    choices = desk.page.locator("#alternatives button")
    choices.first.wait_for()
    assert 2 <= choices.count() <= 6
    assert "%" in choices.nth(1).inner_text()

    word = choices.nth(1).inner_text().rsplit(" ", 1)[0].replace("↵", "\n").replace("␣", " ")
    choices.nth(1).click()
    desk.wait_until_done()

    assert word in desk.text()[len(OPENING) : place + 8]


@in_browser
def test_notes_come_first_and_what_is_read_is_shown(desk: Desk) -> None:
    desk.page.fill("#note", "主角是老和尚。")
    desk.page.fill("#text", "山门外大雪纷飞。" * 200)
    desk.page.click("#reading summary")
    note = desk.page.locator("#reading-text .note")
    note.wait_for()
    assert note.inner_text().strip() == "主角是老和尚。"
    assert re.match(r"读到 5\d\d / 510 个词元", desk.page.inner_text("#reading-count"))
    assert desk.page.locator("#reading-text del").inner_text()

    desk.page.fill("#note", "很长的设定。" * 200)
    desk.page.locator("#reading-count", has_text="请缩短设定").wait_for()


# Edits at random places of a work, on random branches; what it shows after each, and by replaying.
EDITS = """async () => {
    const tree = await import("./work.js");
    const work = tree.newWork(), shown = [], replayed = [];
    let seed = 7;
    const below = (limit) => (seed = (seed * 48271) % 2147483647) % limit;
    for (let i = 0; i < 300; i++) {
        if (!below(4)) tree.go(work, below(work.nodes.length));
        const length = tree.textOf(work).length, at = below(length + 1);
        const cut = below(Math.min(4, length - at + 1));
        const edit = { at, cut, text: "春江花".slice(0, below(4)) };
        below(2) ? tree.add(work, edit, "m") : tree.type(work, edit);
        shown.push(tree.textOf(work));
        let text = "";
        for (const node of tree.path(work))
            text = text.slice(0, node.at) + node.text + text.slice(node.at + node.cut);
        replayed.push(text);
    }
    return [shown, replayed];
}"""


@in_browser
def test_a_work_shows_what_its_edits_make(desk: Desk) -> None:
    shown, replayed = desk.page.evaluate(EDITS)

    assert shown == replayed
    assert len(set(shown)) > 100


@in_browser
def test_the_answer_as_json(desk: Desk) -> None:
    desk.open_with(OPENING, length=8)
    written = desk.write()
    desk.page.click("#tab-json")

    shown = desk.page.evaluate("JSON.parse(document.querySelector('#view-json').textContent)")

    assert shown["request"]["prompt"] == OPENING
    assert shown["response"]["choices"][0]["text"] == written


@in_browser
def test_by_keyboard_alone(desk: Desk) -> None:
    desk.page.fill("#length", "12")
    desk.page.focus("#text")
    desk.page.keyboard.type("春天来了，")
    desk.page.keyboard.press("Control+Enter")
    desk.page.locator("#ink .by-model:not(:empty)").wait_for()
    desk.wait_until_done()
    desk.page.focus("#text")
    desk.page.keyboard.press("Control+z")
    assert desk.text() == "春天来了，"
    desk.page.keyboard.press("Control+y")
    assert len(desk.text()) > len("春天来了，")
    desk.page.focus("#tab-text")
    desk.page.keyboard.press("ArrowRight")
    assert desk.page.locator("#view-json").is_visible()


@in_browser
def test_works_are_exported_and_imported(desk: Desk, tmp_path: Path) -> None:
    desk.open_with(OPENING, length=8)
    written = desk.write()
    desk.page.fill("#title", "老和尚")
    desk.page.click("#open-works")
    for kind in ("txt", "md", "json"):
        with desk.page.expect_download() as download:
            desk.page.click(f"[data-export={kind}]")
        download.value.save_as(tmp_path / f"work.{kind}")
    assert (tmp_path / "work.txt").read_text(encoding="utf-8") == OPENING + written
    assert (tmp_path / "work.md").read_text(encoding="utf-8").startswith("# 老和尚\n\n" + OPENING)

    desk.page.click("#new-work")
    desk.page.locator("#works").wait_for(state="hidden")
    assert desk.text() == ""
    desk.page.set_input_files("#import-file", tmp_path / "work.json")
    desk.page.locator("#ink .by-model").wait_for()
    assert desk.text() == OPENING + written
    assert desk.page.input_value("#title") == "老和尚"
    (tmp_path / "wrong.json").write_text('{"nodes": [{"id": 3}]}', encoding="utf-8")
    desk.page.set_input_files("#import-file", tmp_path / "wrong.json")
    desk.page.locator("#notice", has_text="不是作品").wait_for()
    assert desk.text() == OPENING + written


@in_browser
def test_files_of_windows_and_files_that_are_none(desk: Desk, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    def import_(name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        desk.page.set_input_files("#import-file", tmp_path / name)

    for name, encoding in (("国标.txt", "gb18030"), ("宽.txt", "utf-16"), ("一.md", "utf-8-sig")):
        import_(name, OPENING.encode(encoding))
        desk.page.locator("#ink", has_text=OPENING).wait_for()
        expect(desk.page.locator("#title")).to_have_value(name.split(".")[0])
        assert desk.text() == OPENING
    import_("picture.txt", bytes(range(256)))
    desk.page.locator("#notice", has_text="不是文本：picture.txt").wait_for()

    node = {"id": 0, "parent": -1, "at": 0, "cut": 0, "text": "", "by": "u"}
    tokens = [{"at": 0, "top": [5, ["x"]]}, {"at": 0, "top": [["山", 0.5]]}]
    more = {"id": 1, "parent": 0, "text": OPENING, "by": "m", "tokens": tokens}
    work = {"nodes": [node, node | more], "here": 1, "settings": {"length": "abc", "top_p": 9}}
    import_("here.json", json.dumps(work | {"here": "length"}).encode())
    desk.page.locator("#notice", has_text="不是作品：here.json").wait_for()
    import_("odd.json", json.dumps(work).encode())
    desk.page.locator("#notice").wait_for(state="hidden")
    assert desk.page.input_value("#length") == "128"
    assert desk.page.input_value("#top_p") == "1"
    desk.page.focus("#text")
    desk.page.keyboard.press("Control+Home")
    desk.page.keyboard.press("Alt+a")
    desk.page.locator("#alternatives button", has_text="山").wait_for()


@in_browser
def test_two_tabs_with_one_work_lose_nothing(desk: Desk) -> None:
    def wait_for_saved(page: Any, text: str) -> None:
        page.click("#open-works")  # saves first
        page.locator("#work-list", has_text=text).wait_for()
        page.click("#works [data-close]")

    desk.page.fill("#text", OPENING)
    wait_for_saved(desk.page, OPENING[:10])
    other = desk.context.new_page()
    other.goto(desk.page.url)
    other.locator("#ink", has_text=OPENING).wait_for()
    desk.page.fill("#text", "甲写的。" + OPENING)
    wait_for_saved(desk.page, "甲写的")
    other.fill("#text", "乙写的。" + OPENING)
    other.locator("#notice", has_text="另一个标签页").wait_for()
    for page, name in ((desk.page, "甲"), (other, "乙")):
        page.click("#open-works")
        page.locator("#work-list", has_text="甲写的").wait_for()
        page.locator("#work-list", has_text="乙写的").wait_for()
        page.click("#works [data-close]")
        assert page.input_value("#text").startswith(name)


@in_browser
def test_reading_labels_and_masks(desk: Desk) -> None:
    desk.page.click("#write")  # without a beginning
    assert desk.page.is_visible("#notice")
    desk.page.click("#tab-read")
    assert not desk.page.is_visible("#notice")
    desk.page.click("form .primary")
    desk.page.locator(".results meter").nth(3).wait_for()
    desk.page.click(".chips [data-task=fill_mask]")
    desk.page.click("form .primary")
    desk.page.locator(".results meter").first.wait_for()

    desk.page.click("#language")
    assert desk.page.locator("form label").first.inner_text().startswith("Text with [MASK]")
    desk.page.click("#language")
    desk.page.locator("form textarea").fill("山上有座[MASK]。")
    desk.page.keyboard.press("Control+Enter")
    desk.page.locator(".results").wait_for()
    desk.page.click("#tab-write")
    assert desk.text() == ""


@in_browser
def test_a_question_to_an_answer(
    browser: Any, scripted_model: Callable[..., Any], serving: Callable[..., Any]
) -> None:
    model = scripted_model("asks")
    asked: list[list[str]] = []

    def question(parts: Sequence[str]) -> list[int]:
        asked.append(list(parts))
        return model.tokenizer.encode(parts[1])

    model.tuned_for, model.question = "questions", question
    model.question_settings = GenerationSettings(out_length=7)
    with serving([model]) as client:
        desk = Desk(browser, f"{client.url}/")
        desk.page.click("#tab-read")
        desk.page.fill("form [name=text]", "北京大学创办于1898年。")
        desk.page.fill("form [name=answer]", "1898年")
        desk.page.click("form .primary")
        desk.page.locator(".results li", has_text="今天").wait_for()
        desk.context.close()
    assert not desk.complaints

    assert asked == [["1898年", "北京大学创办于1898年。"]]


@in_browser
def test_entities_are_marked_behind_a_character_of_two_halves(
    browser: Any, scripted_model: Callable[..., Any], serving: Callable[..., Any]
) -> None:
    model = scripted_model("tags")
    entity = {"text": "杭州", "label": "地", "start": 3, "end": 5}
    model.tuned_for, model.tuned = "tag", lambda _parts: [{"entities": [entity]}]
    with serving([model]) as client:
        desk = Desk(browser, f"{client.url}/")
        desk.page.click("#tab-read")
        desk.page.fill("form [name=text]", "😀我在杭州买茶。")
        desk.page.click("form .primary")
        desk.page.locator(".results mark", has_text="杭州 地").wait_for()
        assert desk.page.inner_text(".results li") == "😀我在杭州 地买茶。"
        desk.context.close()
    assert not desk.complaints


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_widths_themes_and_accessibility(
    scheme: str, width: int, browser: Any, server: str
) -> None:
    pytest.importorskip("axe_playwright_python")
    from axe_playwright_python.sync_playwright import Axe

    size = {"width": width, "height": 844}
    desk = Desk(browser, server, viewport=size, color_scheme=scheme, bypass_csp=True)
    desk.open_with(OPENING, length=8)
    desk.write()

    assert not desk.page.evaluate("document.documentElement.scrollWidth > innerWidth")
    for room in ("#tab-write", "#tab-read"):
        desk.page.click(room)
        found = Axe().run(desk.page).response["violations"]
        assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == []
    desk.page.click("#language")
    assert desk.page.inner_text("h1") == "AI Writer"
    desk.context.close()
    assert not desk.complaints


@in_browser
def test_a_wrong_key_asks_for_the_right_one(browser: Any) -> None:
    with serving("--api-key", "right-key-of-16-signs") as (address, _):
        desk = Desk.__new__(Desk)
        desk.context = browser.new_context(locale="zh-CN")
        desk.page = desk.context.new_page()
        desk.page.set_default_timeout(SECONDS)
        desk.page.goto(address)
        desk.page.locator("#key-dialog[open]").wait_for()
        assert "密钥" in desk.notice()
        for wrong in ("wrong-key-of-16-signs", "密钥"):
            desk.page.fill("#key", wrong)
            desk.page.click("#key-dialog .primary")
            desk.page.locator("#key-dialog[open]").wait_for()
            assert "密钥不对" in desk.notice()
        desk.page.fill("#key", "right-key-of-16-signs")
        desk.page.click("#key-dialog .primary")
        desk.page.locator("#notice").wait_for(state="hidden")
        desk.open_with(OPENING, length=8)
        assert desk.write()
        desk.context.close()


@in_browser
def test_a_server_that_dies_while_writing(browser: Any) -> None:
    with serving() as (address, process):
        desk = Desk(browser, address)
        desk.open_with(OPENING, length=1500)
        desk.page.click("#write")
        desk.page.locator("#ink .by-model:not(:empty)").wait_for()

        process.send_signal(signal.SIGKILL)
        desk.wait_until_done()

        assert "连不上服务器" in desk.notice()
        assert len(desk.text()) > len(OPENING)
        desk.context.close()


@in_browser
def test_a_server_that_comes_back_with_another_model(browser: Any) -> None:
    with serving() as (address, process):
        desk = Desk(browser, address)
        desk.open_with(OPENING, length=8)
        process.send_signal(signal.SIGKILL)
        process.wait()
        port = int(address[:-1].rpartition(":")[2])
        with serving("--served-model-name", "other", port=port):
            assert not desk.write()
            desk.page.locator("#notice", has_text="请再试一次").wait_for()
            assert desk.write()
        desk.context.close()
