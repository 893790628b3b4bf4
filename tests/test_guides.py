"""The guide to fine-tuning the 27B, followed from the original's shards to a merged model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from plug.checkpoints.original import export_original
from plug.loading.save import save
from plug.model.configuration import PRESETS
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

DOCS = Path(__file__).resolve().parents[1] / "docs"
GUIDES = ["finetuning-27b.md", "finetuning-27b.zh-CN.md"]
ELSEWHERE = ("pip install", "torchrun", "deepspeed")  # tried by .ci/run and tests of processes
PIECES = [
    "[PAD]", *(f"[unused{index}]" for index in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]",
    *dict.fromkeys("学校创办于1912年，至今已有一百多这所哪？。"),
]  # fmt: skip


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    lines = "".join(blocks(page, "sh")).splitlines()
    return [re.sub(r"\s+#.*", "", line) for line in lines if not line.startswith(ELSEWHERE)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the guide begins with: the original's directory, small, and two files of data."""
    monkeypatch.chdir(tmp_path)
    Path("vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    config = dataclasses.replace(
        PRESETS["test"],
        vocab_size=128,
        num_emitted_tokens=len(PIECES),
        hidden_size=128,
        intermediate_size=128,
        num_attention_heads=8,
        max_position_embeddings=512,
        unk_token_id=100,
        decoder_start_token_id=101,
        eos_token_id=102,
        mask_token_id=103,
    )
    torch.manual_seed(0)
    tokenizer = PlugTokenizer.from_vocabulary_file(Path("vocab.txt"))
    save(Plug(config), Path("small"), tokenizer=tokenizer)
    export_original(Path("small"), Path("nlp_plug_text-generation_27B"), 2)
    [row] = blocks(GUIDES[0], "json")
    for name, count in (("train.jsonl", 4), ("dev.jsonl", 2)):
        Path(name).write_text(row * count, encoding="utf-8")
    return tmp_path


def test_both_guides_say_the_same() -> None:
    for language in ("sh", "python", "json"):
        assert blocks(GUIDES[0], language) == blocks(GUIDES[1], language) != []


def test_the_guide_can_be_followed(place: Path, run_plug: Callable[..., Any]) -> None:
    typed = commands(GUIDES[0])
    assert [shlex.split(line)[1] for line in typed] == [
        *("info", "convert", "quantize", "finetune", "evaluate", "predict", "merge"),
        *("evaluate", "generate"),
    ]
    for line in typed:
        ran = run_plug(*shlex.split(line)[1:])
        assert ran.status == 0, f"{line}\n{ran.err}"
    merged = json.loads((place / "plug-27b-mine" / "config.json").read_text())
    assert merged["quantization"]["bits"] == 4

    [code] = blocks(GUIDES[0], "python")
    with contextlib.redirect_stdout(None):
        exec(compile(code, GUIDES[0], "exec"), {})
    assert (place / "runs" / "python" / "adapter_config.json").is_file()
