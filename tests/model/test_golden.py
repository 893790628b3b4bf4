"""Parity with the original code's numbers, with the tolerances of the golden files' READMEs.

Tests marked `shared` need the float32 weights of ../shared/golden; the others run from a clone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plug.checkpoints.original import import_original
from plug.loading.load import load
from plug.model.plug import Plug

PAD, SEP = 0, 102
INFER_PASSES, TRAIN_PASSES = 2, 1  # of the encoder's final LayerNorm, in the reference
LoadGolden = Callable[..., Plug]


@pytest.fixture(scope="module")
def load_golden(
    small_golden: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> LoadGolden:
    directories: dict[str, Path] = {}

    def load_one(name: str, passes: int, dtype: torch.dtype = torch.float32) -> Plug:
        if name not in directories:
            directories[name] = tmp_path_factory.mktemp(name) / "model"
            is_small = (small_golden / "checkpoints" / name).is_dir()
            golden = small_golden if is_small else request.getfixturevalue("golden")
            import_original(golden / "checkpoints" / name, directories[name])
        model = load(directories[name], dtype=dtype)
        assert model.encoder.final_norm_passes == INFER_PASSES
        model.encoder.final_norm_passes = passes
        return model

    return load_one


def read(path: Path) -> SimpleNamespace:
    with np.load(path) as arrays:
        plain = {name: arrays[name] for name in arrays if arrays[name].dtype.kind in "if"}
        return SimpleNamespace(**{name: torch.from_numpy(x) for name, x in plain.items()})


@pytest.fixture(scope="module")
def forward(golden: Path) -> SimpleNamespace:
    return read(golden / "forward.npz")


def close(actual: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def outputs_of(layers: nn.ModuleList) -> list[Tensor]:
    """A list that fills with what each layer gives, as the model runs."""
    outputs: list[Tensor] = []
    for layer in layers:
        layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output))
    return outputs


@pytest.mark.shared
@pytest.mark.parametrize("name", ["mp2", "mp8"])
@torch.inference_mode()
def test_inference_equals_the_reference(
    name: str, forward: SimpleNamespace, load_golden: LoadGolden
) -> None:
    model = load_golden(name, INFER_PASSES)
    encoder_layers, decoder_layers = map(outputs_of, (model.encoder.layers, model.decoder.layers))

    encoded = model.encode(forward.input_ids, forward.attention_mask)
    decoded = model.decode(forward.dec_input_ids, encoded, forward.attention_mask)

    close(model.embeddings(forward.input_ids), forward.enc_embeddings)
    close(model.embeddings(forward.dec_input_ids), forward.dec_embeddings)
    close(torch.stack(encoder_layers), forward.enc_layers)
    close(encoded, forward.enc_output_infer)
    close(model.mlm_logits(encoded[:, forward.mlm_positions]), forward.mlm_logits_infer)
    close(model.sentence_logits(encoded), forward.seq_relationship_infer)
    close(torch.stack(decoder_layers), forward.dec_layers_infer, atol=1e-3)
    close(decoded, forward.dec_final_infer)
    close(model.lm_logits(decoded), forward.dec_logits_infer)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["mp2", "mp8"])
@torch.inference_mode()
def test_the_training_path_equals_the_reference(
    name: str, forward: SimpleNamespace, load_golden: LoadGolden
) -> None:
    model = load_golden(name, TRAIN_PASSES)

    encoded = model.encode(forward.input_ids, forward.attention_mask)
    decoded = model.decode(forward.dec_input_ids, encoded, forward.attention_mask)

    close(encoded, forward.enc_output_train)
    close(encoded, forward.enc_all_layers_last)
    close(model.mlm_logits(encoded[:, forward.mlm_positions_train]), forward.mlm_logits_train)
    close(model.sentence_logits(encoded), forward.seq_relationship_train)
    close(decoded, forward.dec_final_train)
    close(model.lm_logits(decoded[:, forward.dec_positions_train]), forward.dec_logits_train)


@pytest.mark.shared
@torch.inference_mode()
def test_token_types_equal_the_reference(forward: SimpleNamespace, load_golden: LoadGolden) -> None:
    model = load_golden("mp2", INFER_PASSES)

    encoded = model.encode(forward.input_ids, forward.attention_mask, forward.token_type_ids)

    close(encoded, forward.enc_output_infer_token_types)
    assert (encoded - forward.enc_output_infer).abs().max() > 0.1  # they matter


@pytest.mark.parametrize(
    ("prefix", "dtype", "atol"),
    [("fp32_compute_", torch.float32, 1e-4), ("fp16_compute_", torch.float16, 5e-2)],
)
@torch.inference_mode()
def test_the_half_checkpoint_equals_the_reference(
    prefix: str,
    dtype: torch.dtype,
    atol: float,
    small_golden: Path,
    load_golden: LoadGolden,
) -> None:
    forward = read(small_golden / "forward.npz")
    expected = vars(read(small_golden / "forward_fp16_checkpoint.npz"))
    model = load_golden("mp2-fp16", INFER_PASSES, dtype)

    encoded = model.encode(forward.input_ids, forward.attention_mask)
    decoded = model.decode(forward.dec_input_ids, encoded, forward.attention_mask)

    close(encoded.float(), expected[f"{prefix}enc_output_infer"], atol)
    close(model.sentence_logits(encoded).float(), expected[f"{prefix}seq_relationship_infer"], atol)
    close(decoded.float(), expected[f"{prefix}dec_final_infer"], atol)
    logits = model.lm_logits(decoded[:, [0, 11, 23]])
    close(logits.float(), expected[f"{prefix}dec_logits_infer"], atol)


def decoder_logits(model: Plug, batch: SimpleNamespace) -> Tensor:
    encoded = model.encode(batch.input_ids, batch.attention_mask)
    return model.lm_logits(model.decode(batch.labels[:, :-1], encoded, batch.attention_mask))


def token_losses(model: Plug, batch: SimpleNamespace) -> Tensor:
    """(batch, tgt): what each step costs, over all ids, padding rows too."""
    logits = decoder_logits(model, batch)
    return F.cross_entropy(logits.transpose(1, 2), batch.labels[:, 1:], reduction="none")


@pytest.mark.shared
@pytest.mark.parametrize(
    ("passes", "key"), [(TRAIN_PASSES, "loss_train"), (INFER_PASSES, "loss_no_checkpoint")]
)
@torch.inference_mode()
def test_the_loss_equals_the_reference(
    passes: int, key: str, golden: Path, load_golden: LoadGolden
) -> None:
    batch = read(golden / "loss.npz")
    losses = token_losses(load_golden("mp8", passes), batch)
    counts = batch.labels[:, :-1] != PAD  # the reference counts a step by its INPUT id

    assert torch.equal(counts.float(), batch.loss_mask)
    close(losses, vars(batch)[f"{key}_per_token"])
    close(losses[counts].mean(), vars(batch)[key])


@torch.inference_mode()
def test_the_loss_of_the_half_checkpoint_is_the_reference_s_but_for_rounding(
    small_golden: Path, load_golden: LoadGolden
) -> None:
    batch = read(small_golden / "loss.npz")
    losses = token_losses(load_golden("mp2-fp16", TRAIN_PASSES), batch)

    close(losses, batch.loss_train_per_token, atol=5e-3)
    assert (batch.loss_train_per_token - batch.loss_no_checkpoint_per_token).abs().max() > 0.05


@pytest.mark.shared
@torch.inference_mode()
def test_labels_of_minus_100_drop_one_step_a_row_from_the_reference_loss(
    golden: Path, load_golden: LoadGolden
) -> None:
    """Ours masks targets: the step from [SEP] to the first pad does not count, all others agree."""
    batch = read(golden / "loss.npz")
    inputs, targets = batch.labels[:, :-1], batch.labels[:, 1:]
    sep_to_pad = (inputs == SEP) & (targets == PAD)
    counted_by_both = (batch.loss_mask == 1) & ~sep_to_pad

    labels = targets.masked_fill(targets == PAD, -100)
    logits = decoder_logits(load_golden("mp8", TRAIN_PASSES), batch)
    ours = F.cross_entropy(logits.transpose(1, 2), labels)

    assert torch.equal(labels != -100, counted_by_both)
    assert sep_to_pad.sum(1).tolist() == [1, 1, 1]
    close(ours, batch.loss_train_per_token[counted_by_both].mean())
    assert abs(ours - batch.loss_train) > 1e-4
    # Up to its [SEP] a row holds no such step, and the two readings are one.
    full = slice(int((targets[0] != PAD).sum()))
    assert torch.equal(inputs[0, full] != PAD, labels[0, full] != -100)
    close(
        F.cross_entropy(logits[0, full], labels[0, full]),
        batch.loss_train_per_token[0, full].mean(),
    )


def gradients_in_their_names(model: Plug) -> dict[str, Tensor]:
    """Ours, joined and renamed by hand to the names in `gradients.npz`."""

    def joined(prefix: str, parts: str, kind: str) -> Tensor:
        module = model.get_submodule(prefix)
        return torch.cat(
            [module.get_submodule(f"{x}_proj").get_parameter(kind).grad for x in parts]
        )

    decoder = model.decoder.layers
    return {
        "bert.embeddings.token_type_embeddings.weight": (
            model.embeddings.token_type_embeddings.weight.grad
        ),
        "bert.embeddings.LayerNorm.weight": model.embeddings.layer_norm.weight.grad,
        "bert.encoder.layer.0.attention.self.query_key_value.weight": joined(
            "encoder.layers.0.attention", "qkv", "weight"
        ),
        "bert.encoder.layer.0.LayerNorm.weight": (
            model.encoder.layers[0].feed_forward_norm.weight.grad
        ),
        "bert.encoder.LayerNorm.weight": model.encoder.final_norm.weight.grad,
        "bert.encoder.LayerNorm.bias": model.encoder.final_norm.bias.grad,
        "decoder.decoder.layer.0.attention.query_key_value.bias": joined(
            "decoder.layers.0.self_attention", "qkv", "bias"
        ),
        "decoder.decoder.layer.1.cross_attention.key_value.weight": joined(
            "decoder.layers.1.cross_attention", "kv", "weight"
        ),
        "decoder.decoder.layer.1.output.weight": decoder[1].feed_forward.fc2.weight.grad,
        "decoder.decoder.final_layernorm.weight": model.decoder.final_norm.weight.grad,
    }


@pytest.mark.shared
@pytest.mark.parametrize("name", ["mp2", "mp8"])
def test_gradients_equal_the_reference(name: str, golden: Path, load_golden: LoadGolden) -> None:
    batch = read(golden / "loss.npz")
    expected = vars(read(golden / "gradients.npz"))
    model = load_golden(name, TRAIN_PASSES)

    loss = token_losses(model, batch)[batch.labels[:, :-1] != PAD].mean()
    loss.backward()

    def assert_close(actual: Tensor, wanted: Tensor) -> None:  # 1e-4 absolute or 1e-3 relative
        difference = (actual - wanted).abs()
        assert bool(((difference <= 1e-4) | (difference <= 1e-3 * wanted.abs())).all())

    assert_close(loss.detach(), expected["loss"])
    found = gradients_in_their_names(model)
    for theirs, gradient in found.items():
        assert_close(gradient, expected[theirs])
    rows = expected["word_embedding_rows"]
    table = model.embeddings.word_embeddings.weight.grad
    assert_close(table[rows], expected["bert.embeddings.word_embeddings.weight[rows]"])
    others = {"loss", "global_norm", "word_embedding_rows"}
    others.add("bert.embeddings.word_embeddings.weight[rows]")
    assert found.keys() | others == expected.keys()  # none was left out
    squares = [x.grad.double().square().sum() for x in model.parameters() if x.grad is not None]
    torch.testing.assert_close(
        torch.stack(squares).sum().sqrt(), expected["global_norm"], rtol=1e-5, atol=0
    )


@pytest.mark.shared
def test_the_same_parameters_get_no_gradient(golden: Path, load_golden: LoadGolden) -> None:
    batch = read(golden / "loss.npz")
    model = load_golden("mp2", TRAIN_PASSES)
    token_losses(model, batch).mean().backward()
    with np.load(golden / "gradients.npz") as arrays:
        theirs = {str(name) for name in arrays["no_grad_params"]}

    renamed = {
        "mlm_head.dense": "cls.predictions.transform.dense",
        "mlm_head.layer_norm": "cls.predictions.transform.LayerNorm",
        "mlm_head": "cls.predictions",
        "sentence_head": "cls.seq_relationship",
    }
    ours = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            module, kind = name.rsplit(".", 1)
            ours.add(f"{renamed[module]}.{kind}")
    assert ours == {name for name in theirs if not name.startswith("bert.pooler")}
