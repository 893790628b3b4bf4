"""Several processes with a share of the model each write what one process writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plug.distributed.processes import Processes
from plug.distributed.tensor_parallel import RowParallelLinear, check_divisible
from plug.errors import UsageError
from plug.generation.generator import Generator, generate
from plug.loading.load import load
from plug.loading.save import save
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.quantization.convert import quantize_directory
from plug.quantization.linear import quantize_modules
from plug.quantization.scheme import Scheme
from plug.tokenization import PlugTokenizer

Run = Callable[..., list[Any]]
CPU = torch.device("cpu")
TEXTS = ["山上有座庙，", "今天天气很好", "我们去公园看花。" * 12]  # the last fills its window
COMMON: dict[str, Any] = {"texts": TEXTS, "out_length": 12}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": COMMON | {"do_sample": False, "repetition_penalty": 1.3},
    "sampling": COMMON | {"seed": [1, 2, 3], "temperature": 1.5, "top_p": 0.9, "window": 7},
    "beams": COMMON | {"num_beams": 3},
    "original": COMMON | {"mode": "original", "seed": 5, "window": 5},
}


@pytest.fixture
def odd_model(lively: Callable[[PlugConfig], Plug]) -> Plug:
    """Its word table has a number of rows that goes into no equal shares."""
    return lively(dataclasses.replace(PRESETS["test"], vocab_size=323))


@pytest.fixture
def odd_directory(odd_model: Plug, tiny_tokenizer: PlugTokenizer, tmp_path: Path) -> Path:
    save(odd_model, tmp_path / "odd", tokenizer=tiny_tokenizer)
    return tmp_path / "odd"


def written(directory: Path, settings: dict[str, dict[str, Any]]) -> dict[str, list[list[int]]]:
    generator = Generator(directory, device="cpu")
    return {
        name: [list(each.token_ids) for each in generate(model=generator, **options)]
        for name, options in settings.items()
    }


@pytest.mark.parametrize("count", [2, 4])
def test_they_write_what_one_process_writes(
    count: int, odd_directory: Path, run_together: Run
) -> None:
    answers = run_together(count, "write", model=str(odd_directory), settings=SETTINGS)

    expected = written(odd_directory, SETTINGS)
    assert [answer["written"] for answer in answers] == [expected] * count
    assert any(len(set(ids)) > 5 for ids in expected["sampling"])
    whole = sum(parameter.nbytes for parameter in load(odd_directory).parameters())
    assert all(answer["held"] < whole * (0.5 + 0.5 / count) for answer in answers)


def test_without_a_seed_all_draw_alike(odd_directory: Path, run_together: Run) -> None:
    settings = {"drawn": COMMON | {"temperature": 2.0}}

    first, second = run_together(2, "write", model=str(odd_directory), settings=settings)

    assert first["written"] == second["written"]


@pytest.mark.parametrize("count", [2, 4])
def test_the_fused_model_can_be_shared_out(
    count: int, odd_directory: Path, run_together: Run
) -> None:
    pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")
    settings = {"greedy": COMMON | {"texts": TEXTS[:1], "out_length": 4, "do_sample": False}}

    answers = run_together(count, "write", model=str(odd_directory), settings=settings, fused=True)

    assert [answer["written"] for answer in answers] == [written(odd_directory, settings)] * count


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_27b_goes_into_equal_shares_that_the_kernels_read_whole(bits: int, count: int) -> None:
    """`skinny_gemm.cu` reads whole tiles of 64 outputs, `one_shot.cu` packets of 8 bytes."""
    config = dataclasses.replace(PRESETS["27b"], num_hidden_layers=1, num_decoder_layers=1)
    with torch.device("meta"):
        model = Plug(config)
        if bits < 16:
            quantize_modules(model, Scheme.of(bits))
    check_divisible(model, count)
    rows, hidden = config.vocab_size // count, config.hidden_size
    assert rows * count == config.vocab_size  # no share of the word table is padded
    outputs = [rows, 3 * hidden // count, hidden // count, config.intermediate_size // count]
    assert all(size % 64 == 0 for size in outputs)
    assert rows * 2 % 8 == hidden * 2 % 8 == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_shares_are_parts_of_the_quantized_weights(
    bits: int,
    lively: Callable[[PlugConfig], Plug],
    tiny_tokenizer: PlugTokenizer,
    tmp_path: Path,
) -> None:
    config = dataclasses.replace(PRESETS["test"], hidden_size=256, intermediate_size=512)
    save(lively(config), tmp_path / "wide", tokenizer=tiny_tokenizer)
    quantize_directory(tmp_path / "wide", tmp_path / "quantized", bits=bits)
    whole = load(tmp_path / "quantized").encoder.layers[0]
    shares = [
        load(tmp_path / "quantized", processes=Processes(rank, 2, CPU)).encoder.layers[0]
        for rank in range(2)
    ]

    for path, dimension in (("attention.k_proj", 0), ("feed_forward.fc2", 1)):
        expected = whole.get_submodule(path).dequantized(torch.float32)
        own = [share.get_submodule(path) for share in shares]
        layers = [each.shard if isinstance(each, RowParallelLinear) else each for each in own]
        parts = [layer.dequantized(torch.float32) for layer in layers]
        assert torch.cat(parts, dimension).equal(expected)
        bias = torch.cat([layer.bias for layer in layers])
        if dimension:  # added once
            bias = sum(layer.bias for layer in layers)
        assert bias.equal(whole.get_submodule(path).bias)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_models_are_written_with_together(
    bits: int,
    lively: Callable[[PlugConfig], Plug],
    tiny_tokenizer: PlugTokenizer,
    tmp_path: Path,
    run_together: Run,
) -> None:
    config = dataclasses.replace(PRESETS["test"], hidden_size=256, intermediate_size=256)
    save(lively(config), tmp_path / "wide", tokenizer=tiny_tokenizer)
    quantize_directory(tmp_path / "wide", tmp_path / "quantized", bits=bits)
    settings = {"greedy": COMMON | {"do_sample": False, "out_length": 4}}

    answers = run_together(2, "write", model=str(tmp_path / "quantized"), settings=settings)

    first, second = (each["written"] for each in answers)
    assert first == second
    # With 8 bits each process rounds activations over its own share, so a near-tie may fall
    # otherwise than in one process. Groups of 128, as 4 bits have, are the same in both.
    alone = written(tmp_path / "quantized", settings)
    if bits == 8:
        first, alone = (
            {name: [ids[:1] for ids in texts] for name, texts in each.items()}
            for each in (first, alone)
        )
    assert first == alone


@pytest.mark.parametrize(
    ("changes", "count", "says"),
    [
        ({}, 3, r"num_attention_heads=4 不能被进程数 3 整除.*--nproc-per-node 2"),
        ({"num_attention_heads": 8, "intermediate_size": 68}, 8, r"intermediate_size=68 .* 4"),
    ],
)
def test_what_cannot_be_shared_out_is_wrong_use(
    changes: dict[str, int],
    count: int,
    says: str,
    make_model: Callable[[PlugConfig], Plug],
    tmp_path: Path,
) -> None:
    save(
        make_model(dataclasses.replace(PRESETS["test"], **changes)), tmp_path / "m", tokenizer=None
    )
    with pytest.raises(UsageError, match=says):
        load(tmp_path / "m", processes=Processes(0, count, CPU))


@pytest.mark.parametrize(("hidden", "inner"), [(128, 256), (256, 128)])
def test_groups_of_4_bits_are_not_torn_apart(
    hidden: int,
    inner: int,
    make_model: Callable[[PlugConfig], Plug],
    tiny_tokenizer: PlugTokenizer,
    tmp_path: Path,
) -> None:
    config = dataclasses.replace(PRESETS["test"], hidden_size=hidden, intermediate_size=inner)
    save(make_model(config), tmp_path / "wide", tokenizer=tiny_tokenizer)
    quantize_directory(tmp_path / "wide", tmp_path / "quantized", bits=4)
    with pytest.raises(UsageError, match=r"每 128 个输入一组，\w+=128 分成 2 份"):
        load(tmp_path / "quantized", processes=Processes(0, 2, CPU))


def test_a_share_has_no_device_map(odd_directory: Path) -> None:
    with pytest.raises(UsageError, match="--device-map"):
        load(odd_directory, processes=Processes(0, 2, CPU), device_map="auto")
