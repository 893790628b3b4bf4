"""Label scores against a computation label by label, without batches or padding."""

from __future__ import annotations

import pytest
import torch

from plug.errors import UsageError
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer
from plug.zero_shot.classify import classify
from plug.zero_shot.encoder import TextEncoder

LABELS = ["花", "公园", "山上有"]


def decoder_score(model: Plug, tokenizer: PlugTokenizer, prompt: str, label: str) -> torch.Tensor:
    source = [tokenizer.cls_token_id, *tokenizer.encode(prompt), tokenizer.sep_token_id]
    target = tokenizer.encode(label)
    encoded = model.encode(torch.tensor([source]))
    total = torch.zeros(())
    for length in range(len(target)):
        fed = torch.tensor([[model.config.decoder_start_token_id, *target[:length]]])
        logits = model.lm_logits(model.decode(fed, encoded))[0, -1]
        total += logits.log_softmax(-1)[target[length]]
    return total / len(target)


def mlm_score(model: Plug, tokenizer: PlugTokenizer, prompt: str, label: str) -> torch.Tensor:
    before, target = [tokenizer.encode_characters(text) for text in (prompt, label)]
    masks = [tokenizer.mask_token_id] * len(target)
    source = [tokenizer.cls_token_id, *before, *masks, *tokenizer.encode("。")]
    encoded = model.encode(torch.tensor([[*source, tokenizer.sep_token_id]]))[0]
    at_masks = encoded[1 + len(before) :][: len(target)]
    logits = model.mlm_logits(at_masks).log_softmax(-1)
    return logits[range(len(target)), target].mean()


@pytest.mark.parametrize(("method", "score"), [("decoder", decoder_score), ("mlm", mlm_score)])
@torch.inference_mode()
def test_labels_are_scored_by_their_likelihood(
    encoder: TextEncoder, method: str, score: object
) -> None:
    shown = "今天是花。\n"  # the example, in the same words
    differences = torch.stack(
        [
            score(encoder.model, encoder.tokenizer, f"{shown}山有庙是", label)
            - score(encoder.model, encoder.tokenizer, f"{shown}是", label)
            for label in LABELS
        ]
    )
    expected = dict(zip(LABELS, differences.softmax(0).tolist(), strict=True))

    found = classify(
        "山有庙", LABELS, examples=[("今天", "花")], prompt="{text}是", method=method, model=encoder
    )

    assert dict(found) == pytest.approx(expected, abs=1e-5)
    assert [label for label, _ in found] == sorted(expected, key=lambda label: -expected[label])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"text": " "}, "文字是空的"),
        ({"labels": ["花"]}, "却有 1 个"),
        ({"labels": ["花", "花"]}, "标签有重复"),
        ({"prompt": "是"}, "没有 {text}"),
        ({"method": "oracle"}, "method='oracle'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    encoder: TextEncoder, changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        classify(**{"text": "山", "labels": LABELS, "model": encoder} | changes)


def test_an_encoder_alone_is_told_to_use_the_other_method(
    config: PlugConfig, tiny_tokenizer: PlugTokenizer
) -> None:
    encoder = Plug(PlugConfig(**config.to_dict() | {"num_decoder_layers": 0}))
    encoder = TextEncoder(encoder, tiny_tokenizer)
    with pytest.raises(UsageError, match="--method mlm"):
        classify("山", LABELS, model=encoder)
    assert len(classify("山", LABELS, method="mlm", model=encoder)) == 3
