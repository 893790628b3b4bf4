"""The site: built strictly, nothing loaded from elsewhere, and found in by Chinese words."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ROOT / "docs" / "guides"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs_static_i18n") is None, reason='needs pip install ".[docs]"'
)
in_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason='needs Chromium and pip install ".[browser]"',
)


def headings(path: Path) -> list[str]:
    """The levels of a page's headings; lines of code that begin with # are none."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"^#+(?= )", text, re.M)


def code(path: Path) -> list[str]:
    """The commands of a page, without comments."""
    fenced = re.findall(r"^```sh\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)
    return [re.sub(r"\s+#.*", "", line) for line in "".join(fenced).splitlines()]


@pytest.mark.parametrize("path", sorted(GUIDES.glob("*.md")), ids=lambda path: path.name)
def test_a_guide_is_there_in_both_languages_and_says_the_same(path: Path) -> None:
    stem = path.name.split(".")[0]
    english, chinese = GUIDES / f"{stem}.md", GUIDES / f"{stem}.zh-CN.md"

    assert english.exists()
    assert chinese.exists()
    assert headings(english) == headings(chinese)
    assert code(english) == code(chinese)
    characters = [
        len(re.findall(r"[\u4e00-\u9fff]", path.read_text("utf-8"))) for path in (english, chinese)
    ]
    assert characters[1] > 1.5 * characters[0]


PROSE = [*sorted(GUIDES.glob("*.md")), *sorted(GUIDES.parent.glob("*.md"))]
PROSE.remove(GUIDES.parent / "experiments.md")  # a log, whose old entries stay as they are


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.name)
def test_lines_fit_a_window(path: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    long = [line for line in prose.splitlines() if len(line) > 120 and line[0] not in "|>!"]
    assert long == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as CI builds it: a dead link, or a dead anchor, fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@needs_mkdocs
@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for path in pages:
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\s\">]+)", text)
        assert loaded == [], path.name


@needs_mkdocs
@pytest.mark.slow
def test_reference_pages_name_what_the_code_has(site: Path) -> None:
    def page(name: str) -> str:
        return (site / "reference" / name).read_text(encoding="utf-8")

    assert "--no-repeat-ngram-size" in page("commands.html")
    assert "plug pretrain stage2" in page("commands.html")
    english = (site / "en" / "reference" / "commands.html").read_text(encoding="utf-8")
    assert "tokens to write at most" in english
    assert "plug evaluate tnews" in page("commands.html")
    assert page("commands.html").count("<h2") < 20  # all tasks of `plug evaluate` are one
    assert "on_text" in page("python.html")
    assert "/v1/fill-mask" in page("http.html")
    # A field's meaning is that of the table in docs/serving.md, or of the setting of its name.
    assert "写多少个词元" in page("http.html")
    assert "只在最可能的这么多个词元里抽" in page("http.html")
    english = (site / "en" / "reference" / "http.html").read_text(encoding="utf-8")
    assert "draw among this many of the likeliest tokens" in english
    assert "写" not in re.sub(r"<nav.*?</nav>|<header.*?</header>", "", english, flags=re.S)


@pytest.fixture
def served(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@needs_mkdocs
@in_browser
@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("种子", "writing"),
        ("显存", "27b"),
        ("断点续训", "pretraining"),
        ("流式输出", "serving"),
        ("top_k", "generation"),
    ],
)
def test_search_finds_chinese_words(served: str, words: str, found: str) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{served}/index.html")
        box = page.locator("input.md-search__input")
        links = page.locator("a.md-search-result__link")
        box.click()
        # Typed while the index is being read, words are not looked for.
        page.locator(".md-search-result__meta", has_text="键入以开始搜索").wait_for()
        box.fill(words)
        box.press("End")  # the page looks when a key is released, as an input method's last one is
        links.first.wait_for()
        addresses = [link.get_attribute("href") or "" for link in links.all()]
        browser.close()
    assert any(found in address for address in addresses), addresses
    assert all(address.startswith((served, "blob:")) for address in asked)
