"""The model prepared for decoding, against its own modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from plug.generation.kv_cache import DecoderCache
from plug.generation.plain_model import PlainModel, attended
from plug.model.plug import Plug

SOURCES = [[2, 9, 8, 7, 6, 5, 3], [2, 200, 0, 40, 3], [2, 30, 31, 3]]  # 0: [PAD]


@pytest.mark.parametrize("together", [False, True])
@torch.inference_mode()
def test_sources_are_encoded_as_alone_and_without_padding(
    together: bool, lively_model: Plug
) -> None:
    plain = PlainModel(lively_model)
    plain._reads_together = together  # as on a GPU

    found = plain.encode(SOURCES)

    assert lively_model.decoder is not None
    for source, pairs in zip(SOURCES, found, strict=True):
        ids = torch.tensor([source])
        hidden = lively_model.encode(ids, ids != 0)
        for (key, value), (wanted_key, wanted_value) in zip(
            pairs, lively_model.decoder.project_encoder(hidden), strict=True
        ):
            torch.testing.assert_close(key, wanted_key[0][:, attended(source, 0)])
            torch.testing.assert_close(value, wanted_value[0][:, attended(source, 0)])


def test_what_is_attended_to() -> None:
    assert attended([2, 9, 3], 0) == slice(0, 3)
    assert attended([2, 0, 9, 0, 3], 0) == [0, 2, 4]


@torch.inference_mode()
def decode(plain: PlainModel, model: Plug) -> Tensor:
    [pairs] = plain.encode(SOURCES[:1])
    cache = DecoderCache(pairs[0][0], layers=len(pairs), rows=1, source_length=7, capacity=4)
    cache.put_sources([0], [pairs])
    fed = torch.tensor([[2, 40, 41]])
    logits = plain.decode(fed, torch.tensor([[0, 1, 2]]), 3, cache)
    hidden = model.decode(fed, model.encode(torch.tensor(SOURCES[:1])))
    torch.testing.assert_close(logits, model.lm_logits(hidden))
    return logits


def test_the_model_itself_stays_as_it_was(lively_model: Plug) -> None:
    before = copy.deepcopy(lively_model.state_dict())
    decode(PlainModel(lively_model), lively_model)

    assert list(lively_model.state_dict()) == list(before)
    assert all(map(torch.equal, lively_model.state_dict().values(), before.values()))
    assert not any(callable(v) for m in lively_model.modules() for v in m._modules if v == "fc1")


def test_a_small_model_decodes_in_one_thread_and_sets_the_number_back(
    lively_model: Plug, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", calls.append)

    decode(PlainModel(lively_model), lively_model)

    assert calls == [1, 7]
