"""Formulae beside what is counted: saved tensors of real models, bytes of directories."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from plug.checkpoints.headers import read_places
from plug.errors import UsageError
from plug.loading.estimate import (
    Training,
    _blocks,
    generation_need,
    resident_share,
    training_need,
    weight_bytes,
)
from plug.loading.load import load
from plug.loading.save import save
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.quantization.convert import quantize_directory
from plug.quantization.linear import QuantizedLinear
from plug.quantization.scheme import Scheme

# Unlike sizes; long enough that what is kept once for a batch does not count.
CONFIG = PlugConfig(
    vocab_size=352,
    num_emitted_tokens=352,
    hidden_size=128,
    num_hidden_layers=3,
    num_decoder_layers=2,
    num_attention_heads=4,
    intermediate_size=384,
    max_position_embeddings=128,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
BATCH, SOURCE, TARGET = 5, 96, 40


@contextmanager
def saved_bytes(parameters: list[nn.Parameter]) -> Iterator[list[int]]:
    """Count the bytes that autograd keeps, each storage once, parameters left out."""
    own = {x.untyped_storage().data_ptr() for x in parameters}
    seen: dict[int, Tensor] = {}
    counted = [0]

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own | seen.keys():
            seen[storage.data_ptr()] = x  # held, so that no other storage takes its place
            counted[0] += storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        yield counted


@pytest.mark.parametrize("target_length", [TARGET, 0])
@pytest.mark.parametrize("half", [False, True])
def test_what_is_kept_for_the_backward_pass_is_what_autograd_keeps(
    half: bool, target_length: int
) -> None:
    """Without dropout, whose masks a CPU keeps in another way than CUDA."""
    from plug.hf import (
        PlugForConditionalGeneration,
        PlugForSequenceClassification,
        PlugTransformersConfig,
    )

    classes: Any = (PlugForConditionalGeneration, PlugForSequenceClassification)
    config = PlugTransformersConfig(**CONFIG.to_dict())
    model = classes[0 if target_length else 1](config).train()
    ids = torch.randint(5, 300, (BATCH, SOURCE))
    labels = torch.randint(5, 300, (BATCH, target_length)) if target_length else torch.zeros(BATCH)
    cast = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()

    with saved_bytes(list(model.parameters())) as counted, cast:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels.long())

    training = Training(
        batch_size=BATCH,
        source_length=SOURCE,
        target_length=target_length,
        half=half,
        dropout=False,
    )
    assert sum(x.entry for x in _blocks(CONFIG, training)) == pytest.approx(counted[0], rel=0.03)


@pytest.mark.parametrize(("stage", "target_length"), [(1, 0), (2, TARGET)])
def test_pre_training_keeps_what_is_counted(stage: int, target_length: int) -> None:
    """Not compiled: weights in float32, the stream and products in bfloat16."""
    from plug.pretraining import losses
    from plug.pretraining.compiled import keep_bf16

    config = CONFIG if stage == 2 else dataclasses.replace(CONFIG, num_decoder_layers=0)
    model = Plug(config).train()
    keep_bf16(model)
    masked = 24
    batch = {
        "input_ids": torch.randint(5, 300, (BATCH, SOURCE)),
        "mlm_positions": torch.randint(0, SOURCE, (BATCH, masked)),
        "mlm_labels": torch.randint(5, 300, (BATCH, masked)),
    }
    if stage == 1:
        batch |= {
            "token_type_ids": torch.zeros(BATCH, SOURCE, dtype=torch.long),
            "word_positions": torch.zeros(BATCH, 0, dtype=torch.long),
            "word_labels": torch.zeros(BATCH, 0, dtype=torch.long),
            "sentence_label": torch.zeros(0, dtype=torch.long),
        }
        run = losses.structbert_losses
    else:
        batch["decoder_input_ids"] = torch.randint(5, 300, (BATCH, TARGET))
        batch["labels"] = torch.randint(5, 300, (BATCH, TARGET))
        run = losses.palm_losses

    with saved_bytes(list(model.parameters())) as counted, torch.autocast("cpu", torch.bfloat16):
        run(model, batch)

    training = Training(
        batch_size=BATCH,
        source_length=SOURCE,
        target_length=target_length,
        dropout=False,
        masked_share=masked / SOURCE,
        half_stream=True,
    )
    assert sum(x.entry for x in _blocks(config, training)) == pytest.approx(counted[0], rel=0.05)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("recomputed", [0, 2, 5])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_layers_with_adapters_keep_what_is_counted(
    bits: int, recomputed: int, kept_bytes: Callable[..., int]
) -> None:
    """The passes of our own, on a CPU; the head's share is left out by way of the loss."""
    peft = pytest.importorskip("peft")
    from plug.finetuning.adapted_layers import adapt_layers
    from plug.finetuning.recomputation import recompute_layers
    from plug.hf import PlugForConditionalGeneration, PlugTransformersConfig
    from plug.hf.adapters import TARGET_MODULES

    values = CONFIG.to_dict()
    if bits < 16:
        values["quantization"] = Scheme.of(bits).to_dict()
    plain = PlugForConditionalGeneration(PlugTransformersConfig(**values)).bfloat16()
    adapters = peft.LoraConfig(target_modules=TARGET_MODULES, r=16, lora_dropout=0.05)
    model = peft.get_peft_model(plain, adapters).train()
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            for name, (dtype, shape) in layer.scheme.tensors(
                layer.out_features, layer.in_features
            ).items():
                layer.register_buffer(name, torch.ones(shape, dtype=dtype))
    assert adapt_layers(model, in_fp8=False) == 5
    recompute_layers(model, recomputed)
    ids = torch.randint(5, 300, (BATCH, SOURCE))
    labels = torch.randint(5, 300, (BATCH, TARGET))

    def run() -> Tensor:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss

    counted = kept_bytes(run, list(model.state_dict(keep_vars=True).values()), ids, labels)

    training = Training(
        batch_size=BATCH,
        source_length=SOURCE,
        target_length=TARGET,
        memory="lora" if bits == 16 else "qlora",
        bits=bits,
        recomputed=recomputed,
    )
    assert sum(x.entry for x in _blocks(CONFIG, training)) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("batch_size", [2, 12])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_the_peak_of_a_step_is_the_one_that_is_counted(
    half: bool,
    recomputes: bool,
    accumulates: bool,
    batch_size: int,
    peak_bytes: Callable[..., int],
) -> None:
    """A step of AdamW after the first; what an operation holds inside of itself does not count."""
    from plug.hf import PlugForConditionalGeneration, PlugTransformersConfig

    model = PlugForConditionalGeneration(PlugTransformersConfig(**CONFIG.to_dict())).train()
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    ids = torch.randint(5, 300, (batch_size, SOURCE))
    labels = torch.randint(5, 300, (batch_size, TARGET))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        optimizer.step()

    step()
    if not accumulates:
        optimizer.zero_grad()
    gradients = [x.grad for x in trained]
    counted = peak_bytes(step, list(model.parameters()), gradients, list(optimizer.state.values()))

    training = Training(
        batch_size=batch_size,
        source_length=SOURCE,
        target_length=TARGET,
        half=half,
        dropout=False,
        recomputed=5 if recomputes else 0,
        accumulates=accumulates,
    )
    assert training_need(CONFIG, training).total == pytest.approx(counted, rel=0.05)


WIDE = {
    "optimizer": "adamw8bit", "batch_size": 32, "source_length": 512, "target_length": 512,
    "accumulates": True, "dropout": False, "masked_share": 0.15, "half_stream": True,
}  # fmt: skip
# On two H100s (docs/devices.md): training, layers of encoder and decoder, GB at the peak of a card.
ON_TWO_CARDS = [
    ({"memory": "lora", "bits": 16, "recomputed": 17}, (24, 6), 43.51),
    ({"memory": "lora", "bits": 16}, (24, 6), 59.01),
    ({}, (4, 1), 44.77),
    (WIDE, (4, 1), 55.05),
    (WIDE | {"fp8": True}, (4, 1), 51.7),
    ({"optimizer": "adamw8bit_fused", "bits": 16, "recomputed": 30}, (24, 6), 65.16),
]


@pytest.mark.parametrize(("options", "layers", "measured"), ON_TWO_CARDS)
def test_shards_take_what_was_measured_on_two_cards(
    options: dict[str, Any], layers: tuple[int, int], measured: float
) -> None:
    encoder, decoder = layers
    config = dataclasses.replace(
        PRESETS["27b"], num_hidden_layers=encoder, num_decoder_layers=decoder
    )
    usual = {"batch_size": 16, "source_length": 384, "target_length": 32, "cards": 2}

    need = training_need(config, Training(**{**usual, **options}))

    assert need.total / 1e9 == pytest.approx(measured, rel=0.02)


def test_what_writing_needs_is_made_of_weights_caches_and_workspace() -> None:
    """27B, 32 texts: the caches are spec section 7's 196,608 bytes a token."""
    config = PRESETS["27b"]
    one, many = (
        generation_need(config, weights=7, batch_size=size, source_length=512, capacity=128)
        for size in (1, 32)
    )
    assert (one.weights, one.caches) == (7, 196_608 * 640)
    assert many.caches == 32 * one.caches
    projected = 16384 * (196_608 + 8192 * 2)  # more than the inside of a layer, 8 x 8192 values
    assert projected < many.workspace < projected + 1e8
    assert one.total == one.weights + one.caches + one.workspace


def test_the_resident_share_is_all_but_the_encoder_s_layers_but_three() -> None:
    with torch.device("meta"):
        model = Plug(PRESETS["27b"])
    layers = sum(p.numel() for p in model.encoder.layers.parameters())
    everything = sum(p.numel() for p in model.parameters())
    expected = 1 - layers * 21 / 24 / everything
    assert resident_share(model.config) == pytest.approx(expected)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_the_bytes_of_weights_are_those_of_a_directory(bits: int, tmp_path: Path) -> None:
    """Unlike sizes, so that rows and columns of each matrix count for what they are."""
    config = dataclasses.replace(PRESETS["test"], hidden_size=128, intermediate_size=384)
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    save(Plug(config), tmp_path / "model", tokenizer=None, dtype=dtype)
    if bits < 16:
        quantize_directory(tmp_path / "model", tmp_path / "quantized", bits=bits)
    directory = tmp_path / ("quantized" if bits < 16 else "model")

    stored = sum(place.spec.num_bytes for place in read_places(directory).values())

    assert weight_bytes(config, bits) == stored
    on_device = sum(x.nbytes for x in load(directory, dtype=dtype).state_dict().values())
    assert on_device == stored


def test_the_rest_of_a_quantized_model_keeps_its_precision(tmp_path: Path) -> None:
    config = dataclasses.replace(PRESETS["test"], hidden_size=128, intermediate_size=384)
    save(Plug(config), tmp_path / "model", tokenizer=None)
    quantize_directory(tmp_path / "model", tmp_path / "quantized", bits=4)

    stored = sum(x.spec.num_bytes for x in read_places(tmp_path / "quantized").values())
    assert weight_bytes(config, 4, bytes_per_value=4) == stored


def test_the_shipped_model_in_4_bits_is_told_as_large_as_it_is() -> None:
    """`plug quantize --bits 4` writes 41.2 MB; 31.5 were told while the word table counted too."""
    assert round(weight_bytes(PRESETS["mini"], 4) / 1e6, 1) == 41.2
    assert round(weight_bytes(PRESETS["mini"], 8) / 1e6, 1) == 65.1


def test_a_model_too_narrow_for_groups_has_no_4_bits() -> None:
    with pytest.raises(UsageError, match="--bits 8"):
        weight_bytes(PRESETS["test"], 4)
