from __future__ import annotations

import logging
import sys

import pytest

from plug import traditional
from plug.errors import UsageError
from plug.traditional import as_read, is_mostly_traditional, to_simplified


@pytest.fixture(autouse=True)
def _has_not_warned() -> None:
    traditional._has_warned.clear()


@pytest.mark.parametrize(
    "text",
    [
        "這是一個繁體中文的句子。",
        "臺灣大學",
        "人工智慧與機器學習",
        "Python 3.12 的說明文件：請參閱官方網站。",
        "後來，他們決定離開這裡。\n" * 200,
    ],
)
def test_traditional_text_is_found(text: str) -> None:
    assert is_mostly_traditional(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "这是一个简体中文的句子。",
        "乾隆皇帝著书立说，朱镕基，陈喆，於是",  # some characters are of both
        "春天来了，山上有座庙，" * 20 + "「這」",
        "東京大學は、日本の國立大學です。",  # Japanese
        "简体字里引用一句「學而時習之」是常有的事，读者一看便知道它的出处，不必改写，也不必另加说明，"
        "照原样放在引号里就好，前后文都是简体。",
    ],
)
def test_other_text_is_not(text: str) -> None:
    assert not is_mostly_traditional(text)


def test_text_is_converted_where_it_is_asked_and_its_layout_stays() -> None:
    pytest.importorskip("opencc", reason="needs the extra opencc")
    text = "  這是[MASK]個句子，\r\n\n我們來看看…… OK😀"

    assert as_read(text, simplify=True) == "  这是[MASK]个句子，\r\n\n我们来看看…… OK😀"
    assert to_simplified("简体不变") == "简体不变"


def test_where_it_is_not_asked_one_warning_says_how(caplog: pytest.LogCaptureFixture) -> None:
    text = "這是一個繁體中文的句子。"
    with caplog.at_level(logging.WARNING):
        assert [as_read(text, simplify=False) for _ in range(3)] == [text] * 3
        as_read("简体", simplify=False)

    [record] = caplog.records
    assert "--simplify" in record.getMessage()


def test_without_opencc_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    traditional._converter.cache_clear()
    monkeypatch.setitem(sys.modules, "opencc", None)

    with pytest.raises(UsageError, match=r"pip install .plug-zh\[opencc\]"):
        as_read("這是", simplify=True)
