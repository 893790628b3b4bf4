"""The examples of README.md, docs/finetuning.md and the guides are typed as they stand and work.

In a folder that has what they name, small: a model in place of the shipped one, the original's
checkpoint, a corpus, data of a few lines, settings for two steps under the names of configs/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from plug.checkpoints import directory
from plug.checkpoints.original import export_original
from plug.loading.save import save
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [
    "README.md",
    "docs/finetuning.md",
    # the Chinese ones have the same commands: tests/site/test_site.py
    *(f"docs/guides/{path.name}" for path in GUIDES if not path.name.endswith(".zh-CN.md")),
]
ELSEWHERE = {  # what is not typed here, and where it is tried
    "pip install": ".ci/run",
    "python3 -m venv": ".ci/run",
    ". .venv/bin/activate": ".ci/run",
    "plug serve": "tests/serving/test_page.py",
    "torchrun": "tests/pretraining/test_processes.py",
    "python -m plug.integrations.modelscope": "tests/integrations/test_modelscope.py",
}
TITLES = ["山上有花，我们去看花。", "今天天气很好，去公园。"]
CHARACTERS = [*"今天气很好，我们去公园看花。山上有座庙春来了"]
PIECES = [  # with the special tokens where the original has them
    "[PAD]", *(f"[unused{index}]" for index in range(1, 100)),
    "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS,
]  # fmt: skip


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for named, block in fenced if named == language]


def commands(page: str) -> list[list[str]]:
    """The words after `plug` of every command but those of `ELSEWHERE`, and those that are marked
    with what they need.
    """
    found = []
    for line in "".join(blocks(page, "sh")).splitlines():
        if " # needs " in line:
            continue
        command = re.sub(r"\s+#.*", "", line).rpartition("&& ")[2]
        if not any(command.startswith(words) for words in ELSEWHERE) and command != "pytest":
            program, *words = shlex.split(command)
            assert program == "plug", line
            found.append(words)
    return found


@pytest.fixture
def workplace(
    tmp_path: Path,
    tiny_tokenizer: PlugTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    undrawn: None,  # noqa: ARG001
) -> Path:
    torch.manual_seed(0)
    config = dataclasses.replace(
        PRESETS["test"],
        vocab_size=1024,
        num_emitted_tokens=320,
        hidden_size=128,
        intermediate_size=128,
        num_attention_heads=8,
        max_position_embeddings=1024,
    )
    save(Plug(config), tmp_path / "assets" / "plug-mini-zh", tokenizer=tiny_tokenizer)
    monkeypatch.setattr(directory, "SHIPPED_DIRECTORY", tmp_path / "assets" / "plug-mini-zh")
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    write_original(config)
    write_corpus()
    write_tasks()
    write_configs()
    shutil.copytree(ROOT / "examples", "examples")
    Path("prompts.txt").write_text("山上有座庙，\n今天天气\n", encoding="utf-8")
    Path("pairs.csv").write_text('text,label\n"山上,花",不同\n"看花,去看花",相同\n', "utf-8")
    return place


def write_original(shape: PlugConfig) -> None:
    """`nlp_plug_text-generation_27B`, and `plug-27b` as `plug convert` would make it."""
    Path("vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    tokenizer = PlugTokenizer.from_vocabulary_file(Path("vocab.txt"))
    ids = {
        "num_emitted_tokens": len(PIECES),
        "unk_token_id": 100,
        "decoder_start_token_id": 101,
        "eos_token_id": 102,
        "mask_token_id": 103,
    }
    save(Plug(dataclasses.replace(shape, **ids)), Path("model"), tokenizer=tokenizer)
    export_original(Path("model"), Path("nlp_plug_text-generation_27B"), 2)


def write_corpus() -> None:
    """Two shards of a domain and another domain; enough documents that some are held out."""
    rng = random.Random(0)
    Path("corpus").mkdir()
    for name in ("novels-00.txt", "novels-01.txt", "news-00.txt"):
        documents = [
            "".join(f"{''.join(rng.choices(CHARACTERS, k=9))}。" for _ in range(40))
            for _ in range(200)
        ]
        Path("corpus", name).write_text("\n\n".join(documents), encoding="utf-8")


def write_tasks() -> None:
    """train.json and dev.json in TNEWS' format, and CLUE's folders with one task in them."""
    rows = [{"sentence": TITLES[n % 2], "label": str(100 + n % 2)} for n in range(8)]
    tests = [{"id": n, "sentence": title} for n, title in enumerate(TITLES)]
    Path("tasks/tnews").mkdir(parents=True)
    for path, lines in (
        ("train.json", rows),
        ("dev.json", rows[:4]),
        ("tasks/tnews/dev.json", rows[:4]),
        ("tasks/tnews/test.json", tests),
    ):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        Path(path).write_text(text, encoding="utf-8")


def write_configs() -> None:
    """The stages' settings as they are in configs/, but for a size and a number of steps."""
    small = {
        "preset": '"test"', "steps": "2", "batch_tokens": "512", "micro_batch_tokens": "512",
        "precision": '"fp32"', "compile": "false", "workers": "0",
    }  # fmt: skip
    shapes = {"stage1": "[[32, 1.0]]", "stage2": "[[16, 16, 1.0]]"}
    run = {"task": "tnews", "train": "train.json", "eval": "dev.json"}
    lines = [f'{name} = "{value}"\n' for name, value in run.items()]
    Path("run.toml").write_text("".join(lines), encoding="utf-8")
    Path("configs").mkdir()
    for path in (ROOT / "configs").glob("*-stage?.toml"):
        values = small | {"shapes": shapes[path.stem.partition("-")[2]]}
        kept = re.sub(r"(?ms)^shapes = \[.*?\]$\n(?=\w)", "", path.read_text(encoding="utf-8"))
        kept = re.sub(rf"(?m)^({'|'.join(values)}) = .*\n", "", kept)
        added = "".join(f"{name} = {value}\n" for name, value in values.items())
        Path("configs", path.name).write_text(kept + added, encoding="utf-8")


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_work(page: str, run_plug: Callable[..., Any]) -> None:
    # a model that an early example writes with is converted in a later one
    typed = sorted(commands(page), key=lambda words: words[0] != "convert")
    assert len(typed) > 8 or "guides" in page
    for words in typed:
        ran = run_plug(*words)
        assert ran.status == 0, f"{shlex.join(['plug', *words])}\n{ran.err}"
        assert ran.out + ran.err


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_works(page: str) -> None:
    found = blocks(page, "python")
    assert found or "guides" in page
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(None):
        for block in found:
            if "  # needs " in block:
                continue
            exec(compile(block, page, "exec"), names)
