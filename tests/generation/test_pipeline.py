from __future__ import annotations

from pathlib import Path

import pytest

from plug.errors import UsageError
from plug.generation.generator import Generator
from plug.generation.pipeline import TextGenerationPipeline, pipeline
from plug.generation.settings import GenerationSettings
from plug.loading.save import save
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer


def test_it_loads_once_and_answers_one_dict_a_text(
    lively_model: Plug, tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    save(lively_model, tmp_path / "model", tokenizer=tiny_tokenizer)
    pipe = pipeline("text-generation", model=tmp_path / "model", device="cpu")
    expected = pipe.generator(["山上", "庙"], out_length=5, seed=1)

    answers = pipe(["山上", "庙"], GenerationSettings(out_length=9), out_length=5, seed=1)

    assert answers == [{"generated_text": each.text} for each in expected]
    assert pipe("山上", out_length=5, seed=1) == answers[:1]


def test_several_texts_of_one_prompt(generator: Generator) -> None:
    pipe = TextGenerationPipeline(generator)
    assert len(pipe("山上", out_length=5, num_return_sequences=3)) == 3


def test_another_task_is_refused() -> None:
    with pytest.raises(UsageError, match=r"translation.*text-generation"):
        pipeline("translation")
