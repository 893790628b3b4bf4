"""What 8 and 4 bits cost in quality: layers of the 27B's shapes, and text that was held out.

    python benchmarks/quantization.py --text build/corpus/heldout --limit 12

`layers`: relative error (norm of the difference over the norm) of the outputs of a layer of random
normal weights and inputs. `nats_per_character`: of plug-mini-zh, as `plug evaluate lm` counts it,
the plain mean over the files; `decoded` computes with the products of the decoding engine, which on
a CPU round activations too (one document at a time). The last line is JSON.
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
from plug.checkpoints.store import find_model_directory, load
from plug.evaluation.language_model import evaluate_language_model
from plug.generation.engine import Engine
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
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        layers = {f"{out}x{inputs}": _layer_errors(out, inputs) for out, inputs in SHAPES}
    result = {
        "layers": layers,
        "nats_per_character": _nats(arguments.text, arguments.limit),
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
        errors[f"int{bits}_decoded"] = error(layer.step_product()(x))
    groups = weight.unflatten(1, (-1, 128))
    scale = groups.abs().amax(2, keepdim=True) / 7
    symmetric = ((groups / scale).round().clamp(-7, 7) * scale).flatten(1)
    errors["int4_symmetric"] = error(F.linear(x, symmetric))
    return errors


def _nats(text: Path, limit: int | None) -> dict[str, float]:
    tokenizer = PlugTokenizer.load(find_model_directory())
    files = expand_paths([text])

    def score(model: plug.Plug, batch_size: int = 8) -> float:
        scores = [
            evaluate_language_model(
                model, tokenizer, islice(read_documents(file), limit), batch_size=batch_size
            )
            for file in files
        ]
        return round(fmean(each.nats_per_character for each in scores), 4)

    with tempfile.TemporaryDirectory() as folder:
        for bits in (8, 4):
            quantize_directory(find_model_directory(), Path(folder, str(bits)), bits=bits)
        results = {"fp32": score(load()), "bf16": score(load(dtype=torch.bfloat16))}
        for bits in (8, 4):
            model = load(Path(folder, str(bits)))
            results[f"int{bits}"] = score(model)
            results[f"int{bits}_decoded"] = score(_as_decoded(model), batch_size=1)
    return results


def _as_decoded(model: plug.Plug) -> plug.Plug:
    """The model with the products of the decoding engine."""
    made = Engine(model)
    model.encoder, model.decoder = made._encoder, made._decoder
    model.lm_logits = made._head  # type: ignore[method-assign]
    return model


if __name__ == "__main__":
    main()
