"""What `mkdocs.yml` needs beyond settings: the pages put in order before a build.

In the repository `X.md` is English and `X.zh-CN.md` Chinese, as readers of files expect. The site
is Chinese first: there `X.md` is Chinese and `X.en.md` English. A page in one language alone serves
both. Links to files outside `docs/` become the names of those files.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import reference

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "docs"
STAGED = ROOT / "build" / "docs"
CHINESE = ".zh-CN.md"
SWITCH = re.compile(r"^\[(中文|English|中文说明)\]\([^)]*\)\n+", re.M)  # the site has its own
# Two lines of Chinese are one: a browser would show the line end between them as a blank.
FENCES = re.compile(r"(^```.*?^```$)", re.M | re.S)
CHINESE_LINE_END = re.compile(
    r"(?<=[\u3000-\u9fff\uff00-\uffef])\n(?=[\u3000-\u9fff\uff00-\uffef])"
)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?:\.\./)+[^)#\s]*)(#[^)\s]*)?\)")


def on_config(config: Any) -> None:
    """Write all pages to `build/docs`, once a build; its two languages read them there."""
    if Path(config.docs_dir) == STAGED:
        return
    config.docs_dir = str(STAGED)
    shutil.rmtree(STAGED, ignore_errors=True)
    for path in sorted(SOURCE.rglob("*")):
        name = path.relative_to(SOURCE)
        if path.is_file() and name.parts[0] != "site":
            target = STAGED / name.with_name(staged_name(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".md":
                target.write_text(staged_text(path), encoding="utf-8")
            else:
                shutil.copyfile(path, target)
    shutil.copytree(SOURCE / "site" / "assets", STAGED / "assets")
    for name, text in reference.pages().items():
        target = STAGED / "reference" / name
        target.parent.mkdir(exist_ok=True)
        target.write_text(text, encoding="utf-8")


def staged_name(path: Path) -> str:
    """What a file of `docs/` is called in the site's sources."""
    if path.name.endswith(CHINESE):
        return path.name.removesuffix(CHINESE) + ".md"
    if path.suffix == ".md" and path.with_suffix(CHINESE).exists():
        return path.stem + ".en.md"
    return path.name


def staged_text(path: Path) -> str:
    """Return a page whose links suit the site; those to files outside `docs/` become their names.

    Raises:
        FileNotFoundError: such a file does not exist.
    """

    def replaced(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(path.parent / link[2]))
        if target.is_relative_to(SOURCE):
            return link[0]
        if not target.exists():
            raise FileNotFoundError(f"{path.relative_to(ROOT)} links to {link[2]}: no such file")
        name = f"`{target.relative_to(ROOT)}`"
        return name if link[1].strip("`") in name else f"{link[1]}（{name}）"

    text = SWITCH.sub("", path.read_text(encoding="utf-8"))
    parts = FENCES.split(text)  # prose, code, prose, …
    parts[::2] = [CHINESE_LINE_END.sub("", prose) for prose in parts[::2]]
    text = "".join(parts)
    return LINK.sub(replaced, text).replace(f"{CHINESE})", ".md)").replace(f"{CHINESE}#", ".md#")
