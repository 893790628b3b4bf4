from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from plug.generation.beam import Hypothesis, beam_search, beam_size
from plug.generation.model_runner import ModelRunner, PreparedModel
from plug.model.plug import Plug

SOURCES = [[2, 9, 8, 7, 6, 5, 3], [2, 200, 3], [2, 30, 31, 32, 3], [2, 77, 70, 3]]


def search(
    prepared: PreparedModel, sources: list[list[int]], num_beams: int = 5, **options: Any
) -> list[Hypothesis]:
    size = beam_size(sources, num_beams, options["max_length"])
    *_, found = beam_search(ModelRunner(prepared, size), sources, num_beams=num_beams, **options)
    return found


def log_probabilities(model: Plug, source: list[int], written: list[int]) -> torch.Tensor:
    with torch.no_grad():
        hidden = model.decode(torch.tensor([written]), model.encode(torch.tensor([source])))
        return model.lm_logits(hidden)[0].log_softmax(-1)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "max_length", "min_length"),
    [("batch", 40, 5), ("batch_max_length_6", 6, 5), ("batch_min_length_0", 40, 0)],
)
def test_beams_are_those_of_the_original(
    name: str,
    max_length: int,
    min_length: int,
    golden_json: Callable[[str], Any],
    exact_golden_prepared: PreparedModel,
) -> None:
    case = golden_json("beam_search.json")
    sources = unpadded(case)

    found = search(exact_golden_prepared, sources, max_length=max_length, min_length=min_length)

    assert [each.token_ids for each in found] == case[name]["predictions"]
    assert [each.score for each in found] == pytest.approx(case[name]["scores"], abs=1e-3)


@pytest.mark.shared
def test_beams_of_one_text_alone_are_those_of_the_original(
    golden_json: Callable[[str], Any], exact_golden_prepared: PreparedModel
) -> None:
    case = golden_json("beam_search.json")
    for source, expected in zip(unpadded(case), case["single"], strict=True):
        found = search(exact_golden_prepared, [source], max_length=40)

        assert [each.token_ids for each in found] == expected["predictions"]
        assert [each.score for each in found] == pytest.approx(expected["scores"], abs=1e-3)


def test_beams_from_the_half_checkpoint_are_those_of_the_original(
    golden_json: Callable[[str], Any], golden_prepared: PreparedModel
) -> None:
    case = golden_json("beam_search.json")
    singles = list(zip(unpadded(case), case["single"], strict=True))
    for source, expected in singles[1:]:  # the first has a tie that float16 decides otherwise
        [found] = search(golden_prepared, [source], max_length=40)

        assert [found.token_ids] == expected["predictions"]
        assert [found.score] == pytest.approx(expected["scores"], abs=1e-2)


def unpadded(case: dict[str, Any]) -> list[list[int]]:
    rows = zip(case["input_ids"], case["attention_mask"], strict=True)
    return [list(itertools.compress(ids, mask)) for ids, mask in rows]


def test_as_many_beams_as_tokens_find_the_best_pair_of_all(lively_model: Plug) -> None:
    source, vocab = SOURCES[0], lively_model.config.vocab_size
    first = log_probabilities(lively_model, source, [2])[0]
    second = torch.stack(
        [log_probabilities(lively_model, source, [2, token])[1] for token in range(vocab)]
    )
    for scores in (first, second):
        scores[..., 3] = -1e20  # [SEP]: the minimum length forbids it
    total = first[:, None] + second
    best = int(total.argmax())

    [found] = search(
        PreparedModel(lively_model), [source], num_beams=vocab, max_length=2, min_length=2
    )

    assert found.token_ids == [best // vocab, best % vocab]
    assert found.score == pytest.approx(total.max().item() / (7 / 6) ** 0.6, abs=1e-4)


def test_one_beam_is_greedy(lively_model: Plug) -> None:
    written = [2]
    for _ in range(6):
        scores = log_probabilities(lively_model, SOURCES[0], written)[-1]
        scores[3] = float("-inf")
        written.append(int(scores.argmax()))

    [found] = search(
        PreparedModel(lively_model), SOURCES[:1], num_beams=1, max_length=6, min_length=6
    )

    assert found.token_ids == written[1:]


def test_the_score_is_the_log_probability_over_the_length_penalty(lively_model: Plug) -> None:
    [found] = search(
        PreparedModel(lively_model), SOURCES[:1], num_beams=3, max_length=9, length_penalty=1.5
    )

    scores = log_probabilities(lively_model, SOURCES[0], [2, *found.token_ids[:-1]])
    each = scores.gather(1, torch.tensor(found.token_ids)[:, None])
    expected = each.sum().item() / ((5 + len(found.token_ids)) / 6) ** 1.5
    assert found.score == pytest.approx(expected, abs=1e-4)


def test_a_batch_of_n_is_n_single_searches(lively_model: Plug) -> None:
    prepared = PreparedModel(lively_model)
    options = {"num_beams": 4, "max_length": 20, "min_length": 1}
    # This id as the end makes the texts of this model end at unlike steps, some of them never.
    prepared.config = dataclasses.replace(prepared.config, eos_token_id=50)

    together = search(prepared, SOURCES, **options)

    alone = [search(prepared, [source], **options)[0] for source in SOURCES]
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    assert [each.score for each in together] == pytest.approx([each.score for each in alone])
    assert len({len(each.token_ids) for each in together}) > 2, "all ended together: no test"
