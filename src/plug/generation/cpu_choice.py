"""What is fastest on this CPU: measured once, then kept beside the library of `kernels/cpu`.

What an instruction set is called says little: MKL has no AVX-512 for every maker's processors, and
oneDNN uses AMX where it is. So the candidates run for some milliseconds at first use. Another
version of PyTorch, of the library or another processor is measured again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plug.errors import PlugError
from plug.files import write_json
from plug.generation.kv_cache import DecoderCache
from plug.generation.plain_model import PlainModel
from plug.jsonfiles import read_json
from plug.kernels.cpu.build import library_file
from plug.kernels.cpu.products import CpuProduct
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.quantization.products import Product

logger = logging.getLogger(__name__)

KERNELS, PYTORCH, BFLOAT16 = "kernels", "pytorch", "bfloat16"
# How much of the time of `kernels/cpu` another candidate may take to be chosen: a near-tie shall
# not be decided by what else the machine did at first use.
_MARGIN = 0.8
_ROUNDS = 7
_SAMPLE = PlugConfig(
    vocab_size=4096, num_emitted_tokens=4096, hidden_size=512, num_attention_heads=8,
    intermediate_size=2048, num_hidden_layers=1, num_decoder_layers=2, max_position_embeddings=128,
)  # fmt: skip


def source_product(kernels: Callable[[nn.Linear], Product]) -> Callable[[nn.Linear], Product]:
    """Return what makes the fastest product of a source with a plain layer; perhaps ``kernels``."""

    def product(linear: nn.Linear) -> Product:
        if linear.weight.is_meta:  # it comes from elsewhere when it is needed
            return linear
        best = fastest_source()
        if best == BFLOAT16 and _fits(linear.weight):
            return in_bfloat16(linear.weight, linear.bias)
        return kernels(linear) if best == KERNELS else linear

    return product


def plain_product(weight: Tensor, bias: Tensor | None) -> CpuProduct:
    """Return the product of `kernels/cpu` with a plain weight, in the bits it was saved in."""
    weight = weight.detach()
    return CpuProduct(weight.bfloat16() if _fits(weight) else weight, bias)


def _fits(weight: Tensor) -> bool:
    """Whether bfloat16 holds float32 weights without loss, as all that were saved in it."""
    return torch.equal(weight.bfloat16().float(), weight)


def fastest_source() -> str:
    """The fastest product of 64 rows: `KERNELS`, `PYTORCH` (`F.linear`) or `BFLOAT16`."""

    def of(make: Callable[[Tensor], Product]) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            product, x = make(torch.ones(2048, 512)), torch.ones(64, 512)
            return lambda: product(x)

        return prepare

    return _fastest(
        "source",
        {
            KERNELS: of(lambda weight: CpuProduct(weight.bfloat16(), None)),
            PYTORCH: of(lambda weight: lambda x: F.linear(x, weight)),
            BFLOAT16: of(lambda weight: in_bfloat16(weight, None)),
        },
    )


def in_bfloat16(weight: Tensor, bias: Tensor | None) -> Product:
    """`F.linear` in bfloat16, for rows in float32; oneDNN has AMX and AVX-512 for it."""
    weight = weight.detach().bfloat16()
    bias = None if bias is None else bias.detach().bfloat16()
    return lambda x: F.linear(x.bfloat16(), weight, bias).float()


def fastest_step(kernels: Callable[[Plug], PlainModel]) -> str:
    """The fastest step of a small plain model: `KERNELS`, or `PYTORCH` for `PlainModel`."""

    def of(make: Callable[[Plug], PlainModel]) -> Callable[[], object]:
        with torch.random.fork_rng(devices=[]):
            model = Plug(_SAMPLE).eval()
        prepared = make(model.bfloat16().float())
        encoded = prepared.encode([[2, *range(8, 70), 3]])[0]
        cache = DecoderCache(encoded[0][0], layers=2, rows=1, source_length=64, capacity=64)
        cache.put_sources([0], [encoded])
        ids, position = torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), 63)
        return lambda: prepared.decode(ids, position, 64, cache)

    return _fastest("step", {KERNELS: lambda: of(kernels), PYTORCH: lambda: of(PlainModel)})


_known: dict[str, str] = {}


def _fastest(kind: str, candidates: Mapping[str, Callable[[], Callable[[], object]]]) -> str:
    """The name of the fastest of ``candidates``, each of which prepares what is timed."""
    if kind not in _known:
        milliseconds = _kept().get(kind, {})
        if not milliseconds.keys() >= candidates.keys():
            milliseconds = _times(candidates)
            _keep(kind, milliseconds)
        best = min(candidates, key=milliseconds.__getitem__)
        is_clear = milliseconds[best] < _MARGIN * milliseconds[KERNELS]
        _known[kind] = best if is_clear else KERNELS
    return _known[kind]


@torch.inference_mode()
def _times(candidates: Mapping[str, Callable[[], Callable[[], object]]]) -> dict[str, float]:
    """Milliseconds of each, the best of some rounds in turn."""
    prepared = {name: make() for name, make in candidates.items()}
    found = dict.fromkeys(candidates, float("inf"))
    for _ in range(_ROUNDS):
        for name, act in prepared.items():
            began = time.perf_counter()
            act()
            found[name] = min(found[name], (time.perf_counter() - began) * 1000)
    return {name: round(each, 4) for name, each in found.items()}


def _kept() -> dict[str, dict[str, float]]:
    """What earlier processes measured, with this version of PyTorch; empty if nothing of use."""
    path = library_file().with_suffix(".json")
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
        return {
            str(kind): {str(name): float(each) for name, each in times.items()}
            for kind, times in content["milliseconds"].items()
            if content["torch"] == torch.__version__
        }
    except (PlugError, KeyError, TypeError, ValueError, AttributeError):
        logger.info("%s 读不出，重新测量各种乘法的快慢。", path)
        return {}


def _keep(kind: str, milliseconds: dict[str, float]) -> None:
    path = library_file().with_suffix(".json")
    logger.info("量出了这台机器上的快慢（%s，毫秒），记在 %s：%s", kind, path, milliseconds)
    try:
        known = _kept() | {kind: milliseconds}
        write_json(path, {"torch": torch.__version__, "milliseconds": known})
    except PlugError as error:
        logger.info("没能记下（%s），下次再量。", error)
