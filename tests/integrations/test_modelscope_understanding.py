"""ModelScope's names for understanding, answered by models of `plug finetune`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("modelscope", reason='needs ModelScope: pip install ".[modelscope]"')
pytest.importorskip("datasets", reason='ModelScope needs it: pip install ".[modelscope]"')
pytest.importorskip("addict", reason='ModelScope needs it: pip install ".[modelscope]"')
pytest.importorskip("sortedcontainers", reason='ModelScope needs it: pip install ".[modelscope]"')
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ModelScope's own, and of what it imports
    from modelscope.pipelines import pipeline
    from modelscope.utils.constant import Tasks

    import plug.integrations.modelscope
import plug
from plug.checkpoints.hub import write_finetuned_configuration
from plug.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore")  # as above


@pytest.fixture
def finetuned(model_directory: Path, tmp_path: Path) -> Callable[..., Path]:
    """A directory as `plug finetune` leaves it for a kind, with a random head."""
    from plug.finetuning.kind import make_kind
    from plug.tokenization import PlugTokenizer

    def make(kind: str, labels: list[str], pairs: bool | None = None) -> Path:
        torch.manual_seed(1)
        tokenizer = PlugTokenizer.load(model_directory)
        directory = tmp_path / kind
        made = make_kind(kind, tokenizer, labels, source_length=32, pairs=pairs)
        made.load_model(model_directory).save_pretrained(directory)
        tokenizer.save(directory)
        settings = {"task": kind, "source_length": 32, "target_length": 8, "num_beams": 1}
        run = {"settings": settings, "labels": labels, "label_names": {}, "pairs": pairs}
        (directory / "finetuning.json").write_text(json.dumps(run))
        write_finetuned_configuration(directory, kind, 1)
        return directory

    return make


def test_text_classification(finetuned: Callable[..., Path]) -> None:
    directory = finetuned("classification", ["花", "山", "庙"])
    pipe = pipeline(Tasks.text_classification, model=str(directory))
    texts = ["今天天气很好", "山上有座庙", "花"]
    answers = pipe(texts, batch_size=2)
    predictor = plug.Predictor(directory)
    for text, answer in zip(texts, answers, strict=True):
        found = predictor.predict_text(text)
        assert answer["labels"][0] == found["label"]
        assert answer["scores"][0] == pytest.approx(found["probability"], abs=1e-4)
        assert sum(answer["scores"]) == pytest.approx(1)
        assert answer["scores"] == sorted(answer["scores"], reverse=True)
        assert sorted(answer["labels"]) == sorted(["花", "山", "庙"])
    assert pipe("花", topk=1) == {key: value[:1] for key, value in answers[2].items()}
    with pytest.raises(UsageError, match="topk=0"):
        pipe("花", topk=0)


def test_a_pair_in_modelscopes_forms(finetuned: Callable[..., Path]) -> None:
    directory = finetuned("classification", ["0", "1"], pairs=True)
    pipe = pipeline(Tasks.sentence_similarity, model=str(directory))
    answer = pipe(("花", "山"))
    assert pipe({"text": "花", "text2": "山"}) == answer
    assert pipe([("花", "山"), ("山", "花")])[0]["labels"] == answer["labels"]
    with pytest.raises(UsageError, match="两段文字"):
        pipe("花")
    with pytest.raises(UsageError, match="输入应是文字、两段文字的元组"):
        pipe(("花", 3))


def test_token_classification(finetuned: Callable[..., Path]) -> None:
    directory = finetuned("labelling", ["O", "B-X", "I-X", "B-Y", "I-Y"])
    pipe = pipeline(Tasks.token_classification, model=str(directory))
    text = "今天天气很好，我们去公园看花。山上有座庙"
    predictor = plug.Predictor(directory)
    entities = predictor.predict_text(text)["entities"]
    assert entities, "a model that finds nothing shows nothing"
    assert pipe(text) == {
        "output": [
            {"type": each["type"], "start": each["start"], "end": each["end"],
             "span": text[each["start"] : each["end"]]}
            for each in entities
        ]
    }  # fmt: skip
    assert pipeline(Tasks.named_entity_recognition, model=str(directory))([text]) == [pipe(text)]


def test_fill_mask(model_directory: Path) -> None:
    pipe = pipeline(Tasks.fill_mask, model=str(model_directory))
    text = "今天[MASK]气很[MASK]。"
    first, second = (
        choices[0].text for choices in plug.fill_mask(text, model=str(model_directory))
    )
    assert pipe(text) == {"text": f"今天{first}气很{second}。"}
    with pytest.raises(UsageError, match=r"没有 \[MASK\]"):
        pipe("今天")
    with pytest.raises(UsageError, match="没有参数 top_k。可用：无"):
        pipe(text, top_k=2)
