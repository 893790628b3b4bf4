from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from plug.checkpoints.weights import (
    TensorSpec,
    WeightWriter,
    check_finite,
    check_names_and_shapes,
)
from plug.errors import PlugError

SPECS = {
    "half": TensorSpec(torch.float16, (3,)),  # 6 bytes: what follows would not be aligned
    "table": TensorSpec(torch.float32, (4, 6)),
    "short": TensorSpec(torch.bfloat16, (5,)),
}


def test_regions_written_in_any_order_make_the_tensor(tmp_path: Path) -> None:
    table = torch.arange(24.0).view(4, 6)
    with WeightWriter(tmp_path, SPECS) as writer:
        for rows, columns in ((slice(1, 4), slice(2, 6)), (slice(0, 4), slice(0, 2))):
            writer.write("table", table[rows, columns], (rows, columns))
        writer.write("table", table[:1, 2:].double(), (slice(0, 1), slice(2, 6)))
        writer.write("short", torch.arange(5))
        writer.write("half", torch.full((3,), 0.5))

    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert found["table"].equal(table)
    assert found["short"].equal(torch.arange(5).bfloat16())
    assert found["half"].equal(torch.full((3,), 0.5).half())


def test_every_tensor_is_aligned_to_its_own_size(tmp_path: Path) -> None:
    with WeightWriter(tmp_path, SPECS):
        pass

    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, spec in SPECS.items():
        assert (8 + length + header[name]["data_offsets"][0]) % spec.dtype.itemsize == 0
    assert header["__metadata__"] == {"format": "pt"}  # `transformers` insists


def test_a_value_of_another_shape_is_not_broadcast(tmp_path: Path) -> None:
    writer = WeightWriter(tmp_path, SPECS)

    with writer, pytest.raises(ValueError, match=r"\(6,\) into \(4, 6\)"):
        writer.write("table", torch.zeros(6))


def test_an_error_while_a_tensor_is_written_is_the_one_that_is_raised(tmp_path: Path) -> None:
    """Its traceback holds a view of the memory map, which then cannot be closed."""
    specs = {"a": TensorSpec(torch.float32, (4,))}

    def write() -> None:
        with WeightWriter(tmp_path, specs) as writer:
            writer.write("a", torch.zeros(3))

    with pytest.raises(ValueError, match=r"\(3,\) into \(4,\)"):
        write()


def test_a_fine_tuned_classifier_is_called_so(tmp_path: Path) -> None:
    found = {"encoder.a": (2,), "classifier.weight": (3, 2)}
    with pytest.raises(PlugError, match="plug predict"):
        check_names_and_shapes(tmp_path, found, {"encoder.a": (2,), "decoder.a": (2,)})


@pytest.mark.filterwarnings("ignore")  # torchao's own, when it is imported
def test_what_a_moment_in_8_bits_is_made_of_is_checked() -> None:
    """torchao's tensor has no least value; its scales have."""
    kind = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit
    moment = kind.zeros((2, 256), True, 256)
    check_finite("run", [("moment", moment)])
    moment.scale[1] = float("nan")
    with pytest.raises(PlugError, match=r"run 里有 NaN 或无穷大：.*moment"):
        check_finite("run", [("moment", moment)])
