"""A tiny original directory, and programs run as the model card's readers run them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from plug.checkpoints.original import export_original
from plug.loading.save import save
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug

CHARACTERS = "段誉轻挥折扇，摇了头说道你师父是的可不我今天气很好们去公园看花山上有座庙什么？"


@pytest.fixture
def original(make_model: Callable[[PlugConfig], Plug], tmp_path: Path) -> Path:
    """A tiny original directory with a vocabulary, and ModelScope's file, as it was released."""
    pieces = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]",
              "[MASK]", *dict.fromkeys(CHARACTERS)]  # fmt: skip
    config = dataclasses.replace(
        PRESETS["test"],
        vocab_size=160,
        num_emitted_tokens=len(pieces),
        pad_token_id=0, unk_token_id=100, decoder_start_token_id=101, eos_token_id=102,
        mask_token_id=103, encoder_final_norm_passes=2,
    )  # fmt: skip
    save(make_model(config), tmp_path / "ours", tokenizer=None)
    directory = tmp_path / "hub" / "nlp_plug_text-generation_27B"
    export_original(tmp_path / "ours", directory, 2)
    (directory / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return directory


@pytest.fixture
def run_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs one of the card's programs, given values for the names in capitals: what it prints."""

    from plug.integrations.modelscope.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    def run(program: str, **values: object) -> str:
        for name, value in values.items():
            program = program.replace(name, repr(value))
        (tmp_path / "card.py").write_text(program, encoding="utf-8")
        assert main(["card.py"]) == 0
        return capsys.readouterr().out

    return run
