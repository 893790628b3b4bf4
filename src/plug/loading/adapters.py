"""LoRA adapters as peft saves them, for inference: read and put into a model without peft.

An adapter's directory has `adapter_config.json` and `adapter_model.safetensors`; those that
`plug finetune` wrote also say in `finetuning.json` which model they were trained on.

Plain weights become W + s B A when the adapter is loaded, so that every product is as fast as
before. Beside a quantised weight the two small matrices are kept: `AdaptedLinear`.

Source: Hu et al. 2021, arXiv:2106.09685; the scale of rsLoRA, arXiv:2312.03732; DoRA,
arXiv:2402.09353.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plug.checkpoints.directory import ADAPTER_CONFIG, RUN_FILE
from plug.checkpoints.headers import read_header, read_places
from plug.checkpoints.weights import finite, map_tensors, shorten
from plug.errors import PlugError, UsageError
from plug.jsonfiles import read_json, shown
from plug.quantization.linear import QuantizedLinear
from plug.quantization.products import Product

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_KEY = "base"  # of `finetuning.json`: the `fingerprint` of the model that was adapted
MERGED_KEY = "merged"  # the same, of a model with an adapter in its weights: which one, in which
_PREFIX = "base_model.model."  # of every name in peft's files
_PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
# What peft can do besides and a product of two matrices cannot.
_OTHER = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "fan_in_fan_out", "kasa_config",
    "layer_replication", "lora_bias", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip
_SAFE_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others change the base
_ROWS = 256  # of the word table, in a fingerprint


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to one linear layer.

    Attributes:
        a: (rank, in), float32.
        b: (out, rank), the adapter's scale in it.
        magnitude: (out,), the norms that DoRA gives the rows; None: the sum as it is.
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None

    def merged(self, weight: Tensor) -> Tensor:
        """``weight`` (out, in) with the adapter in it; computed in float32, rounded once."""
        found = weight.float() + self.b.to(weight.device) @ self.a.to(weight.device)
        if self.magnitude is not None:
            found *= (self.magnitude.to(found.device) / found.norm(dim=1))[:, None]
        return found.to(weight.dtype)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        directory: where it was read.
        layers: what is added, by the linear layer's name.
        head: the weights of parts that were trained whole, by their names.
    """

    directory: Path
    layers: dict[str, LowRank] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)

    @property
    def has_classifier(self) -> bool:
        """Whether it makes a classifier of its model, which then needs no decoder."""
        return "classifier.bias" in self.head

    @property
    def num_outputs(self) -> int:
        """Rows of that classifier; 0: there is none."""
        return len(self.head["classifier.bias"]) if self.has_classifier else 0


class AdaptedLinear(nn.Module):
    """A linear layer with the product of two small matrices beside it, for inference.

    Args:
        base: the layer.
        low_rank: what is added.
    """

    def __init__(self, base: nn.Module, low_rank: LowRank) -> None:
        super().__init__()
        self.base = base
        device = base.get_buffer("weight").device if isinstance(base, QuantizedLinear) else None
        self._a, self._b = low_rank.a.to(device), low_rank.b.to(device)
        self._ratio: Tensor | None = None
        if low_rank.magnitude is not None:
            weight = _weight(base).float()
            norm = (weight + self._b @ self._a).norm(dim=1)
            self._ratio = low_rank.magnitude.to(device) / norm

    @property
    def added(self) -> LowRank | None:
        """What is added to the base's product; None where its rows are scaled besides (DoRA)."""
        return LowRank(self._a, self._b) if self._ratio is None else None

    def forward(self, x: Tensor) -> Tensor:
        return self.with_product(self.base)(x)

    def with_product(self, product: Product) -> Product:
        """The whole layer, where ``product`` computes the base."""
        a, b, ratio, bias = self._a, self._b, self._ratio, self.base.bias

        def adapted(x: Tensor) -> Tensor:
            y = product(x)
            added = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
            if ratio is None:
                return y + added
            assert isinstance(bias, Tensor)
            return (y - bias + added) * ratio.to(x.dtype) + bias

        return adapted


def has_adapters(model: nn.Module) -> bool:
    """Whether small matrices stand beside weights of ``model``."""
    return any(isinstance(part, AdaptedLinear) for part in model.modules())


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    return (Path(directory) / ADAPTER_CONFIG).is_file() and not (
        Path(directory) / "config.json"
    ).is_file()


def read_adapter(directory: str | Path, base: Path) -> Adapter:
    """An adapter, checked to be of the model in the directory ``base``.

    Raises:
        UsageError: there is none, it does what only peft can, or it was trained on another model.
        PlugError: it is damaged.
    """
    directory = Path(directory).expanduser()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (directory / name).is_file():
            raise UsageError(
                f"{directory} 不是适配器的目录：没有 {name}。请给出 plug finetune --memory lora"
                " 的输出目录，或 peft 的 save_pretrained 写的目录。"
            )
    config = _read_config(directory / ADAPTER_CONFIG)
    _check_base(directory, base)
    places = read_header(directory / ADAPTER_WEIGHTS)
    named = dict(finite(directory, map_tensors(places)))
    parts: dict[str, dict[str, Tensor]] = {}
    found = Adapter(directory)
    for name, tensor in named.items():
        own = name.removeprefix(_PREFIX)
        suffix = next((each for each in _PARTS if own.endswith(each)), None)
        if not name.startswith(_PREFIX) or (suffix is None and "lora_" in own):
            raise UsageError(
                f"{directory} 里的 {shown(name)} 不认识。"
                "请用 peft 载入它，再保存 merge_and_unload() 返回的模型。"
            )
        if not tensor.dtype.is_floating_point:
            raise PlugError(
                f"{directory} 里的 {shown(name)} 是整数（{tensor.dtype}），应为浮点数。"
                "请重新取得适配器。"
            )
        if suffix is None:
            found.head[own] = tensor
        else:
            parts.setdefault(own.removesuffix(suffix), {})[suffix] = tensor.float()
    if not parts:
        raise PlugError(f"{directory} 里没有适配器的矩阵，它什么也不改变。请重新取得适配器。")
    for layer, tensors in parts.items():
        a, b = tensors.get(_PARTS[0]), tensors.get(_PARTS[1])
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or not 0 < len(a) == b.shape[1]:
            raise PlugError(f"{directory} 里 {layer} 的两个矩阵不全或不相配。请重新取得适配器。")
        if len(a) not in config.ranks:
            raise PlugError(
                f"{directory} 里 {layer} 的秩是 {len(a)}，{ADAPTER_CONFIG} 里是"
                f" {'、'.join(map(str, sorted(config.ranks)))}。请重新取得适配器。"
            )
        magnitude = tensors.get(_PARTS[2])
        wanted = (len(b),) if config.is_dora else None
        if wanted != (None if magnitude is None else tuple(magnitude.shape)):
            raise PlugError(
                f"{directory} 里 {layer} 的模长（DoRA）与 {ADAPTER_CONFIG} 的"
                f" use_dora={config.is_dora} 不符。请重新取得适配器。"
            )
        scale = config.alpha / (math.sqrt(len(a)) if config.is_rank_stabilised else len(a))
        found.layers[layer] = LowRank(a, b * scale, magnitude)
    return found


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Put an adapter into a model whose weights are there, for inference.

    Raises:
        PlugError: the adapter is of a model of another shape; ``model`` is as it was.
    """
    check_shapes(adapter, shapes_of(model))
    for name, low_rank in adapter.layers.items():
        layer = model.get_submodule(name)
        if isinstance(layer, QuantizedLinear):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, AdaptedLinear(layer, low_rank))
        else:
            assert isinstance(layer, nn.Linear)
            with torch.no_grad():
                layer.weight = nn.Parameter(low_rank.merged(layer.weight), requires_grad=False)
    state = dict(model.named_parameters())
    for name, tensor in adapter.head.items():
        with torch.no_grad():
            state[name].copy_(tensor)


def check_shapes(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a `PlugError` unless an adapter is of a model with tensors of these shapes.

    Args:
        adapter: what is checked.
        shapes: by name; a quantised weight under its own name, with the shape that it stands for.
    """
    wanted: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (len(each.b), each.a.shape[1]) for name, each in adapter.layers.items()
    }
    wanted |= {name: tuple(tensor.shape) for name, tensor in adapter.head.items()}
    wrong = [
        f"{name} 是 {list(shape)}，模型里"
        + (f"是 {list(shapes[name])}" if name in shapes else "没有")
        for name, shape in wanted.items()
        if shapes.get(name) != shape
    ]
    if wrong:
        raise PlugError(
            f"适配器 {adapter.directory} 与模型不符，{len(wrong)} 个权重："
            f"{shorten(wrong[:3])}。请用训练它的那个模型。"
        )


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's weights by name, for `check_shapes`."""
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    for name, part in model.named_modules():
        if isinstance(part, QuantizedLinear):
            shapes[f"{name}.weight"] = (part.out_features, part.in_features)
    return shapes


def fingerprint(directory: Path) -> str:
    """What tells a model from others of its shape, however its layers are quantised.

    A hash of the weights that quantising leaves alone: biases, norms, and the first rows of the
    word table, each in bfloat16. `plug merge` leaves them alone too, and says what it merged.
    """
    places = read_places(directory)
    chosen = {
        name: place
        for name, place in sorted(places.items())
        if name.startswith(("embeddings.", "encoder.", "decoder."))
        and place.spec.dtype.is_floating_point
        and not name.endswith((".scale", ".center"))
        and (len(place.spec.shape) == 1 or name == "embeddings.word_embeddings.weight")
    }
    digest = hashlib.sha256()
    tensors = dict(map_tensors(chosen))
    for name in chosen:
        rounded = tensors[name][:_ROWS] if tensors[name].dim() > 1 else tensors[name]
        digest.update(name.encode())
        digest.update(rounded.bfloat16().contiguous().view(torch.int16).numpy().tobytes())
    digest.update(str(_run_of(directory).get(MERGED_KEY, "")).encode())
    return digest.hexdigest()[:32]


def merged_mark(base: Path, adapter: Path) -> str:
    """What `finetuning.json` says under `MERGED_KEY`."""
    digest = hashlib.sha256(fingerprint(base).encode())
    digest.update((adapter / ADAPTER_WEIGHTS).read_bytes())
    return digest.hexdigest()[:32]


def _run_of(directory: Path) -> dict[str, Any]:
    """Return `finetuning.json`; {} where there is none, or something else."""
    run = read_json(directory / RUN_FILE) if (directory / RUN_FILE).is_file() else {}
    return run if isinstance(run, dict) else {}


class _Config(NamedTuple):
    """What `adapter_config.json` says of the matrices: their ranks and what they are scaled by."""

    ranks: frozenset[int]
    alpha: float
    is_rank_stabilised: bool
    is_dora: bool


def _read_config(path: Path) -> _Config:
    config: Any = read_json(path)
    if not isinstance(config, dict):
        raise PlugError(f"{path} 已损坏：不是一个 JSON 对象。请重新取得适配器。")
    if config.get("peft_type") != "LORA":
        raise UsageError(
            f"{path} 的 peft_type={shown(config.get('peft_type'))}，只支持 LORA。"
            "请用 peft 载入它，再保存 merge_and_unload() 返回的模型。"
        )
    used = [name for name in _OTHER if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if config.get("init_lora_weights") not in _SAFE_STARTS:
        used.append("init_lora_weights")
    if used:
        raise UsageError(
            f"{path} 用了 {used[0]}={shown(config[used[0]])}，这里不支持。"
            "请用 peft 载入它，再保存 merge_and_unload() 返回的模型。"
        )
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
        raise PlugError(f"{path} 的 lora_alpha={shown(alpha)} 不是数。请重新取得适配器。")
    pattern = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [pattern])]
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise PlugError(f"{path} 的秩 {shown(rank)} 不是整数。请重新取得适配器。")
    return _Config(
        ranks=frozenset(ranks),
        alpha=float(alpha),
        is_rank_stabilised=bool(config.get("use_rslora")),
        is_dora=bool(config.get("use_dora")),
    )


def _check_base(directory: Path, base: Path) -> None:
    """Refuse an adapter that says it was trained on another model than ``base``."""
    run = _run_of(directory)
    trained_on = run.get(BASE_KEY)
    if trained_on is not None and trained_on != fingerprint(base):
        settings = run.get("settings")
        named = settings.get("model") if isinstance(settings, dict) else None
        raise UsageError(
            f"适配器 {directory} 不是在 {base} 上训练的（训练时的模型是 {shown(named)}）。"
            "请用 --model 指定原来的模型，或它量化后的目录。"
        )


def _weight(layer: nn.Module) -> Tensor:
    if isinstance(layer, QuantizedLinear):
        return layer.dequantized(torch.float32)
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach()
