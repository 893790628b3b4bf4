"""What 8 and 4 bits cost in quality: layers of the 27B's shapes, and text that was held out.

    python benchmarks/quantization.py --text build/corpus/heldout --limit 12

`layers`: relative error (norm of the difference over the norm) of the outputs of a layer of random
normal weights and inputs. `nats_per_character`: of plug-mini-zh, as `plug evaluate lm` counts it,
the plain mean over the files; `decoded` feeds the text to the decoding engine token by token, whose
products round activations too. `fp8_sources` (on a CPU) computes what a Hopper GPU makes of
sources: weights and activations rounded to FP8, here with PyTorch's casts and float32 sums. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F

import plug
from plug.checkpoints.directory import find_model_directory
from plug.device import find_device
from plug.evaluation.language_model import cut, evaluate_language_model
from plug.generation.model_runner import ModelRunner, PreparedModel, Size
from plug.loading.load import load
from plug.pretraining.corpus import expand_paths, read_documents
from plug.quantization.convert import quantize_directory
from plug.quantization.linear import QuantizedLinear
from plug.quantization.scheme import Scheme
from plug.tokenization import PlugTokenizer

SHAPES = ((8192, 8192), (32768, 8192), (8192, 32768))  # out, in


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=None, help="documents of each file")
    parser.add_argument("--model", help="plug-mini-zh where it is not installed with the package")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = find_device(arguments.device)
    with torch.inference_mode(), device:
        layers = {f"{out}x{inputs}": _layer_errors(out, inputs) for out, inputs in SHAPES}
    result = {
        "layers": layers,
        "nats_per_character": _nats(arguments.model, arguments.text, arguments.limit, device),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "limit": arguments.limit,
        "date": time.strftime("%Y-%m-%d"),
        "plug": plug.__version__,
        "torch": torch.__version__,
    }
    print(json.dumps(result))


def _layer_errors(out: int, inputs: int) -> dict[str, float]:
    weight, x = torch.randn(out, inputs), torch.randn(4, inputs)
    expected = F.linear(x, weight)

    def error(actual: torch.Tensor) -> float:
        return float(f"{((actual - expected).norm() / expected.norm()).item():.3g}")

    errors = {"bf16": error(F.linear(x.bfloat16(), weight.bfloat16()).float())}
    for bits in (8, 4):
        scheme = Scheme.of(bits)
        with torch.device("meta"):
            layer = QuantizedLinear(inputs, out, scheme)
        tensors = {**scheme.quantize(weight), "bias": torch.zeros(out)}
        layer.load_state_dict(tensors, assign=True)
        errors[f"int{bits}"] = error(F.linear(x, layer.dequantized(torch.float32)))
        if x.is_cuda:
            errors |= {f"int{bits}_{name}": error(y) for name, y in _on_cuda(layer, x).items()}
        else:
            errors[f"int{bits}_decoded"] = error(layer.step_product()(x))
    groups = weight.unflatten(1, (-1, 128))
    scale = groups.abs().amax(2, keepdim=True) / 7
    symmetric = ((groups / scale).round().clamp(-7, 7) * scale).flatten(1)
    errors["int4_symmetric"] = error(F.linear(x, symmetric))
    return errors


def _on_cuda(layer: QuantizedLinear, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the engine makes of a step's rows and of a source's."""
    from plug.kernels.packed_linear import PackedLinear

    layer.bias = layer.bias.bfloat16()
    decoded = PackedLinear(layer)(x.bfloat16())
    many = x.bfloat16().repeat(32, 1)  # more rows than count as few
    return {
        "decoded": decoded.float(),
        "source": PackedLinear(layer, for_sources=True)(many)[:4].float(),
    }


def _nats(
    name: str | None, text: Path, limit: int | None, device: torch.device
) -> dict[str, float]:
    directory = find_model_directory(name)
    tokenizer = PlugTokenizer.load(directory)
    documents = [list(islice(read_documents(file), limit)) for file in expand_paths([text])]

    def score(model: plug.Plug) -> float:
        scores = [evaluate_language_model(model, tokenizer, each) for each in documents]
        return round(fmean(each.nats_per_character for each in scores), 4)

    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        for bits in (8, 4):
            quantize_directory(directory, Path(folder, str(bits)), bits=bits)
        results = {
            "fp32": score(load(directory, device=device, dtype=torch.float32)),
            "bf16": score(load(directory, device=device, dtype=torch.bfloat16)),
        }
        if device.type == "cuda":
            model = load(directory, device=device, dtype=half)
            results["bf16_decoded"] = _decoded(model, tokenizer, documents)
        for bits in (8, 4):
            model = load(Path(folder, str(bits)), device=device, dtype=half)
            results[f"int{bits}"] = score(model)
            results[f"int{bits}_decoded"] = _decoded(model, tokenizer, documents)
            if device.type == "cpu":
                results[f"int{bits}_fp8_sources"] = score(_with_fp8_sources(model))
    return results


class _InFP8(torch.nn.Module):
    """What `plug.kernels.packed_linear.PackedLinear` computes of many rows."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        weight = layer.dequantized(torch.float32)
        if layer.scheme.bits == 8:
            scale = layer.scale[:, None]
        else:
            most = layer.center.float().abs() + 8 * layer.scale.float().abs()
            scale = most.amax(1, keepdim=True) / 448
        self.weight, self.bias = _rounded(weight, scale), layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(_rounded(x, x.abs().amax(-1, keepdim=True) / 448), self.weight, self.bias)


def _rounded(x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    return (x / unit).to(torch.float8_e4m3fn).float() * unit


def _with_fp8_sources(model: plug.Plug) -> plug.Plug:
    assert model.decoder is not None
    for name, module in list(model.named_modules()):
        of_source = name.startswith("encoder.") or name.endswith(
            ("cross_attention.k_proj", "cross_attention.v_proj")
        )
        if isinstance(module, QuantizedLinear) and of_source:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _InFP8(module))
    return model


@torch.inference_mode()
def _decoded(
    model: plug.Plug, tokenizer: PlugTokenizer, documents: list[list[str]], batch_size: int = 32
) -> float:
    """Nats a character of decoding, fed with what stands in the text; the mean over files."""
    prepared = PreparedModel(model)
    runner = ModelRunner(prepared, Size(batch_size, 130, 129))
    start, found = model.config.decoder_start_token_id, []
    for texts in documents:
        examples = [each for text in texts if (each := cut(text, tokenizer, 128, 128)).target]
        nats = 0.0
        for first in range(0, len(examples), batch_size):
            batch = examples[first : first + batch_size]
            longest = max(len(each.target) for each in batch)
            sources = [[tokenizer.cls_token_id, *e.source, tokenizer.sep_token_id] for e in batch]
            targets = torch.tensor(
                [[*each.target, *[-100] * (longest - len(each.target))] for each in batch],
                device=prepared.device,
            )
            fed = F.pad(targets[:, :-1].clamp_min(0), (1, 0), value=start)
            runner.start(sources)
            for position in range(longest):
                logits = runner.logits(fed[:, position].tolist(), [position] * len(batch))
                nats += F.cross_entropy(logits, targets[:, position], reduction="sum").item()
        found.append(nats / sum(each.characters for each in examples))
    return round(fmean(found), 4)


if __name__ == "__main__":
    main()
