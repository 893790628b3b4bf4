"""A tiny `Plug` that writes lively text, its directory, a padded batch, and a short training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plug.loading.save import save
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.tokenization import BYTE_TOKENS, PlugTokenizer

pytest.importorskip("transformers")

BATCH, SOURCE, TARGET, EMITTED = 3, 7, 5, 311


@pytest.fixture
def plug_model(config: PlugConfig, make_model: Callable[[PlugConfig], Plug]) -> Plug:
    """A model that writes lively text, and would write padding rows of its word table if let."""
    model = make_model(dataclasses.replace(config, num_emitted_tokens=EMITTED))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and name.startswith(("decoder", "embeddings.word")):
                parameter *= 3
        model.embeddings.word_embeddings.weight[EMITTED:] *= 4
    return model


@pytest.fixture
def directory(plug_model: Plug, tmp_path: Path) -> Path:
    save(plug_model, tmp_path / "model", tokenizer=None)
    return tmp_path / "model"


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(BATCH, SOURCE, dtype=torch.long)
    mask[1, 4:] = 0
    mask[2, 2:] = 0
    labels = torch.randint(5, EMITTED, (BATCH, TARGET))
    labels[1, 3:] = -100
    mlm_labels = torch.full((BATCH, SOURCE), -100)
    mlm_labels[:, 1] = torch.tensor([9, 8, 7])
    word_labels = torch.full((BATCH, SOURCE), -100)
    word_labels[0, 3:6] = torch.tensor([6, 5, 4])
    return {
        "input_ids": torch.randint(5, EMITTED, (BATCH, SOURCE)) * mask,
        "attention_mask": mask,
        "token_type_ids": torch.arange(SOURCE).ge(3).long().expand(BATCH, -1),
        "labels": labels,
        "mlm_labels": mlm_labels,
        "word_labels": word_labels,
        "sentence_labels": torch.tensor([2, 0, 1]),
    }


@pytest.fixture
def source(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the encoder reads of the batch."""
    return {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}


@pytest.fixture
def mean_nats() -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy by hand, one position after another."""

    def compute(logits: Tensor, labels: Tensor) -> Tensor:
        nats = [
            -row.double().log_softmax(-1)[label]
            for row, label in zip(logits.flatten(0, -2), labels.flatten().tolist(), strict=True)
            if label != -100
        ]
        return torch.stack(nats).mean().float()

    return compute


@pytest.fixture
def assert_same_weights() -> Callable[..., None]:
    def check(model: torch.nn.Module, other: torch.nn.Module) -> None:
        torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)

    return check


@pytest.fixture
def byte_pieces() -> PlugTokenizer:
    """Our own kind, of four pieces besides bytes."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *BYTE_TOKENS]
    pieces = [*special, "春", "天", "来", "春天"]
    return PlugTokenizer.from_pieces({piece: i for i, piece in enumerate(pieces)}, [("春", "天")])


class RandomExamples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Twelve examples with labels of unlike lengths."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        self.ids = torch.randint(5, EMITTED, (12, SOURCE))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.ids[index].clone()
        labels[2 + index % 4 :] = -100
        return {"input_ids": self.ids[index], "labels": labels}


@pytest.fixture
def train() -> Callable[..., Any]:
    """`train(model, folder, **arguments)`: three steps of the Trainer, which is returned."""
    from transformers import Trainer, TrainingArguments

    def run(model: Any, folder: Path, **settings: Any) -> Any:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=3,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            dataloader_pin_memory=False,
            **settings,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=RandomExamples())
        trainer.train()
        return trainer

    return run
