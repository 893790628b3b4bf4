"""`plug info`: what a model costs, by part, before anything is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from plug.finetuning.memory import Mode
    from plug.loading.estimate import Need, Training
    from plug.model.configuration import PlugConfig


def info(
    model: Annotated[
        str, typer.Option(help="规格名（test、mini、base、large、27b）、plug-mini-zh 或模型目录。")
    ] = "plug-mini-zh",
    preset: Annotated[
        str | None, typer.Option(help="规格名，代替 --model。", show_default=False)
    ] = None,
    source_length: Annotated[
        int | None, typer.Option(min=1, help="计算量按多少个原文词元算（默认 512）。")
    ] = None,
    position: Annotated[
        int | None, typer.Option(min=1, help="计算量按写到第几个词元算（默认 128）。")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="显存按一起写（默认 1）或训练（默认 16）多少段文字算。", show_default=False
        ),
    ] = None,
    memory: Annotated[
        Literal["generate", "finetune", "pretrain"] | None,
        typer.Option(
            help="按公式预测显存的峰值：写作、微调或预训练，各种方式各一行；不需要 GPU。",
            show_default=False,
        ),
    ] = None,
    target_length: Annotated[
        int, typer.Option(min=0, help="训练时写多少词元；0 为没有解码器的任务，如分类。")
    ] = 32,
    card: Annotated[
        str | None,
        typer.Option(help="显卡的显存，如 24GB：说明哪些方式放得下。", show_default=False),
    ] = None,
    cards: Annotated[int, typer.Option(min=1, help="几张这样的卡一起训练（FSDP2）。")] = 1,
    tensor: Annotated[
        int,
        typer.Option(min=1, help="预训练：其中几张合算每一层（张量并行，即 parallel.tensor）。"),
    ] = 1,
    device: Annotated[
        Literal["cpu"] | None,
        typer.Option(
            help="cpu：在这台机器的 CPU 上写作要多少内存、够不够，以及用哪种指令。",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="输出 JSON。")] = False,
) -> None:
    """查看模型各部分的参数量、各精度的字节数、每词元的计算量，或各种用法要多少显存。"""
    _check_card(memory, card, cards, tensor)
    config, num_labels = _find_config(preset or model)
    if device is not None:
        lengths = (source_length, position)
        _tell_cpu(preset or model, config, batch_size or 1, lengths, as_json)
        return
    if memory is not None:
        lengths = (source_length, position if memory == "generate" else target_length)
        shared = (cards, tensor)
        _tell_memory(preset or model, config, memory, batch_size, lengths, card, shared, as_json)
        return
    batch_size = batch_size or 1
    source_length = _length("--source-length", source_length, 512, config)
    position = _length("--position", position, 128, config)
    costs = _costs(config, num_labels, source_length, position, batch_size)
    if as_json:
        print(json.dumps({"model": preset or model, **costs}, ensure_ascii=False, indent=2))
    else:
        _print_tables(preset or model, costs)


def _find_config(model: str) -> tuple[PlugConfig, int | None]:
    """The shape; of a fine-tuned classifier, which has no decoder, the number of labels too."""
    from plug.model.configuration import PRESETS, PlugConfig

    if model in PRESETS:
        return PRESETS[model], None
    from plug.checkpoints.directory import CONFIG_FILE, find_model_directory
    from plug.checkpoints.headers import read_places

    directory = find_model_directory(model)
    config = PlugConfig.from_file(directory / CONFIG_FILE)
    head = read_places(directory).get("classifier.weight")
    if head is None:
        return config, None
    return dataclasses.replace(config, num_decoder_layers=0), head.spec.shape[0]


def _length(option: str, asked: int | None, default: int, config: PlugConfig) -> int:
    from plug.errors import UsageError

    longest = config.max_position_embeddings
    if asked is None:
        return min(default, longest)
    if asked > longest:
        raise UsageError(f"{option} {asked} 超过该模型的最大长度 {longest}。请取更小的值。")
    return asked


def _costs(
    config: PlugConfig,
    num_labels: int | None,
    source_length: int,
    position: int,
    batch_size: int,
) -> dict[str, Any]:
    from plug.errors import UsageError
    from plug.loading.estimate import generation_need, weight_bytes
    from plug.model import accounting

    sizes: dict[str, int | None] = {}  # None: the model cannot be had so
    needs: dict[str, int | None] = {}
    for name, bits in (("fp32", 32), ("bf16", 16), ("int8", 8), ("int4", 4)):
        sizes[name] = None
        if config.num_decoder_layers:
            needs[name] = None
        with contextlib.suppress(UsageError):  # too narrow for groups of 4 bits
            sizes[name] = size = weight_bytes(config, bits, num_labels=num_labels)
            if not config.num_decoder_layers:  # an encoder alone writes nothing
                continue
            needs[name] = generation_need(
                config,
                weights=size,
                batch_size=batch_size,
                source_length=source_length,
                capacity=position,
                bytes_per_value=4 if name == "fp32" else 2,
                bits=bits,
            ).total
    by_part = {name: part.parameters for name, part in accounting.parts(config, num_labels).items()}
    return {
        "config": config.to_dict(),
        "parameters": {**by_part, "total": sum(by_part.values())},
        "bytes": sizes,
        "batch_size": batch_size,
        "generation_bytes": needs,
        "source_length": source_length,
        "position": position,
        "encoder_flops_per_token": accounting.encoder_flops(config, source_length) // source_length,
        "cross_projection_flops_per_token": accounting.cross_projection_flops(config, 1),
        "decoder_flops_per_token": accounting.step_flops(config, source_length, position),
        "decoder_weights_per_token": accounting.step_weights(config),
        "cache_bytes_per_token": accounting.cache_bytes(config),
    }


def _tell_memory(
    model: str,
    config: PlugConfig,
    use: str,
    batch_size: int | None,
    lengths: tuple[int | None, int | None],
    card: str | None,
    shared: tuple[int, int],
    as_json: bool,
) -> None:
    """Print what each way of a use takes at its peak, and whether it fits the card.

    Args:
        model: as it was named.
        config: of the model.
        use: of `--memory`.
        batch_size: in examples; None: the use's own.
        lengths: of source and target; None: the use's own.
        card: its memory, as typed.
        shared: cards, and how many of them compute each layer together.
        as_json: print JSON.
    """
    from plug.options import bytes_of

    cards, tensor = shared
    room = None if card is None else bytes_of(card, "--card")
    source = _length("--source-length", lengths[0], 512 if use == "generate" else 384, config)
    target = _length("--target-length", lengths[1], 128, config)
    size = batch_size or (1 if use == "generate" else 16)
    if use == "generate":
        rows = _writing(config, size, source, target)
    elif use == "finetune":
        rows = _finetuning(config, size, source, target, room, cards)
    else:
        rows = _pretraining(config, size, source, target, room, cards, tensor)
    for row in rows:
        if room is not None and row["peak_bytes"] is not None:
            row["fits"] = row["peak_bytes"] + row.pop("overhead_bytes") <= room
        row.pop("overhead_bytes", None)
    told = {
        "model": model,
        "memory": use,
        "batch_size": size,
        "source_length": source,
        "target_length": target,
        "card_bytes": room,
        "cards": cards,
        "tensor": tensor,
        "ways": rows,
    }
    if as_json:
        print(json.dumps(told, ensure_ascii=False, indent=2))
    else:
        _print_ways(told)


def _check_card(memory: str | None, card: str | None, cards: int, tensor: int) -> None:
    """Refuse options that nothing would read."""
    from plug.errors import UsageError

    if memory is None and card is not None:
        raise UsageError(
            f"--card {card} 要与 --memory 一起用：请加上 --memory generate、finetune 或 pretrain。"
        )
    if memory not in ("finetune", "pretrain") and cards > 1:
        raise UsageError(f"--cards {cards} 只用于训练：请加上 --memory finetune 或 pretrain。")
    if memory != "pretrain" and tensor > 1:
        raise UsageError(f"--tensor {tensor} 只用于预训练：请加上 --memory pretrain。")


def _row(name: str, need: Need | None, **more: Any) -> dict[str, Any]:
    from plug.loading.estimate import OVERHEAD_BYTES

    return {
        "name": name,
        **more,
        "peak_bytes": None if need is None else need.total,
        "bytes": None if need is None else need.to_dict(),
        "overhead_bytes": OVERHEAD_BYTES,
    }


def _writing(
    config: PlugConfig, batch_size: int, source: int, position: int
) -> list[dict[str, Any]]:
    from plug.errors import UsageError
    from plug.loading.estimate import generation_need, weight_bytes

    rows = []
    for name, bits in (("fp32", 32), ("bf16", 16), ("int8", 8), ("int4", 4)):
        need = None
        with contextlib.suppress(UsageError):
            need = generation_need(
                config,
                weights=weight_bytes(config, bits),
                batch_size=batch_size,
                source_length=source,
                capacity=position,
                bytes_per_value=4 if bits == 32 else 2,
                bits=bits,
            )
        rows.append(_row(name, need))
    return rows


def _finetuning(
    config: PlugConfig, batch_size: int, source: int, target: int, room: int | None, cards: int
) -> list[dict[str, Any]]:
    """For each mode the best way that fits; where none does, or no card is named, the extremes."""
    from plug.finetuning.memory import MODES, NO_LIMIT, SHARDED_MODES, best_way, smallest_way
    from plug.loading.estimate import Training

    training = Training(
        batch_size=batch_size, source_length=source, target_length=target, cards=cards
    )
    rows = []
    for mode in MODES if cards == 1 else SHARDED_MODES:
        found = [best_way(config, mode, training, room or NO_LIMIT)]
        if room is None or found[0] is None:
            found.append(smallest_way(config, mode, training))
        for way in found:
            if way is not None:
                given_up = {
                    "batch_size": way.training.batch_size,
                    "accumulated": way.accumulated,
                    "recomputed_layers": way.training.recomputed,
                }
                rows.append(_row(mode.name, way.need, **given_up))
        if found == [None, None]:
            rows.append(_row(mode.name, None))
    if cards > 1:
        rows.append(_offloaded(config, SHARDED_MODES[0], training, room or NO_LIMIT))
    return rows


def _offloaded(config: PlugConfig, mode: Mode, training: Training, room: int) -> dict[str, Any]:
    """The row of a mode whose shards are in the host's memory (`parallel.cpu_offload`)."""
    from plug.finetuning.memory import best_way, smallest_way
    from plug.loading.estimate import host_need

    away = dataclasses.replace(training, offload=True)
    way = best_way(config, mode, away, room) or smallest_way(config, mode, away)
    assert way is not None, "nothing is impossible in float32"
    return _row(
        f"{mode.memory} {mode.optimizer} cpu_offload",
        way.need,
        batch_size=way.training.batch_size,
        accumulated=way.accumulated,
        recomputed_layers=way.training.recomputed,
        host_bytes=host_need(config, way.training),
    )


def _pretraining(
    config: PlugConfig,
    batch_size: int,
    source: int,
    target: int,
    room: int | None,
    cards: int,
    tensor: int,
) -> list[dict[str, Any]]:
    """For each optimizer, with FP8, and compiled, the fewest recomputed layers that fit.

    Where none does, or no card is named: no layer and all layers. Compiled ones are not recomputed,
    and not split over cards.

    Raises:
        UsageError: so many cards cannot split the layers.
    """
    from dataclasses import replace

    from plug.finetuning.memory import layers_in
    from plug.loading.estimate import OVERHEAD_BYTES, Training, training_need

    if tensor > 1:
        import torch

        from plug.distributed.parallel_layers import check_mesh
        from plug.distributed.processes import Processes

        check_mesh(config, Processes(0, cards, torch.device("cpu"), tensor=tensor))
    rows = []
    for name in ("adamw", "adamw8bit", "adamw8bit fp8", "muon", "muon compile"):
        optimizer, _, setting = name.partition(" ")
        if setting == "compile" and tensor > 1:
            continue
        training = Training(
            batch_size=batch_size,
            source_length=source,
            target_length=target,
            optimizer=optimizer,
            cards=cards,
            tensor=tensor,
            accumulates=True,
            dropout=False,
            masked_share=0.15,
            half_stream=True,
            fp8=setting == "fp8",
            compiled=setting == "compile",
        )
        layers = layers_in(config, training)
        needs = {
            count: training_need(config, replace(training, recomputed=count))
            for count in ([0] if training.compiled else range(layers + 1))
        }
        fitting = (
            count
            for count, need in needs.items()
            if room is not None and need.total + OVERHEAD_BYTES <= room
        )
        fewest = next(fitting, None)
        for count in sorted({0, max(needs)}) if fewest is None else [fewest]:
            given_up = {"batch_size": batch_size, "accumulated": 1, "recomputed_layers": count}
            rows.append(_row(name, needs[count], **given_up))
    return rows


def _print_ways(told: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from plug.loading.estimate import OVERHEAD_BYTES

    words = {"generate": "写作", "finetune": "微调", "pretrain": "预训练"}[told["memory"]]
    with_card = told["card_bytes"] is not None
    size = f"，{told['card_bytes'] / 1e9:g} GB 的卡" if with_card else ""
    if told["cards"] > 1:
        together = f"（张量并行 {told['tensor']}）" if told["tensor"] > 1 else ""
        size += f" {told['cards']} 张{together}，每张"
    console = Console()
    console.print(
        f"[bold]{told['model']} {words}的显存峰值（预测，GB）：一批 {told['batch_size']} 段，"
        f"读 {told['source_length']}、写 {told['target_length']} 个词元{size}[/bold]"
    )
    rows = told["ways"]
    gives_up = any("accumulated" in row for row in rows)
    groups: dict[str, tuple[str, ...]] = {"权重": ("weights",)}
    if told["memory"] == "generate":
        groups |= {"缓存": ("caches",), "运算": ("workspace",)}
    else:
        groups |= {"状态": ("gradients", "optimizer"), "激活": ("activations", "workspace")}
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("方式", no_wrap=True)
    for head in (*(["批", "重算"] if gives_up else []), *groups, "峰值"):
        table.add_column(head, justify="right")
    if with_card:
        table.add_column("够")
    for row in rows:
        if row["bytes"] is None:
            table.add_row(row["name"], "不支持")
            continue
        batch = f"{row['batch_size']}×{row['accumulated']}" if "accumulated" in row else ""
        table.add_row(
            row["name"],
            *([batch, str(row["recomputed_layers"])] if gives_up else []),
            *(_gigabytes(sum(row["bytes"][n] for n in names)) for names in groups.values()),
            _gigabytes(row["peak_bytes"]),
            *(["是" if row["fits"] else "否"] if with_card else []),
        )
    console.print(table)
    if with_card:
        console.print(f"够：峰值之外还要空着 {_gigabytes(OVERHEAD_BYTES)} GB，给 CUDA 和碎片。")
    if gives_up:
        console.print("批：一次算几段×几次一步。重算：几层在反向时重算。状态：梯度和优化器。")
    for row in rows:
        if "host_bytes" in row:
            host = _gigabytes(row["host_bytes"])
            console.print(f"cpu_offload：分片、梯度和状态在内存里，各卡一共 {host} GB。")


def _tell_cpu(
    model: str,
    config: PlugConfig,
    batch_size: int,
    lengths: tuple[int | None, int | None],
    as_json: bool,
) -> None:
    """Print what writing takes on this machine's CPU, and whether it has that."""
    from plug.errors import UsageError
    from plug.kernels.cpu.build import instructions
    from plug.loading.estimate import Room
    from plug.loading.host_memory import free_host_memory
    from plug.loading.memory import need_on_cpu

    if not config.num_decoder_layers:
        raise UsageError(f"{model} 只有编码器，不能写作。请用有解码器的模型。")
    source = _length("--source-length", lengths[0], 512, config)
    position = _length("--position", lengths[1], 128, config)
    room = Room(batch_size=batch_size, source_length=source, capacity=position)
    free, rows = free_host_memory(), []
    for bits in _saved_bits(model):
        need = None
        with contextlib.suppress(UsageError):  # too narrow for groups of 4 bits
            need = need_on_cpu(config, bits, room)
        rows.append(
            {
                "bits": bits,
                "need_bytes": None if need is None else need.total,
                "bytes": None if need is None else need.to_dict(),
                "fits": None if need is None or free is None else need.total <= free,
            }
        )
    told = {
        "model": model,
        "device": "cpu",
        "batch_size": batch_size,
        "source_length": source,
        "position": position,
        "free_bytes": free,
        "instructions": instructions(),
        "precisions": rows,
    }
    if as_json:
        print(json.dumps(told, ensure_ascii=False, indent=2))
    else:
        _print_cpu(told)


def _saved_bits(model: str) -> tuple[int, ...]:
    """Of the layers of a directory; all that there are, of a preset."""
    from plug.checkpoints.directory import CONFIG_FILE, find_model_directory
    from plug.checkpoints.headers import read_places
    from plug.model.configuration import PRESETS
    from plug.quantization.scheme import read_scheme

    if model in PRESETS:
        return (32, 16, 8, 4)
    directory = find_model_directory(model)
    scheme = read_scheme(directory / CONFIG_FILE)
    if scheme is not None:
        return (scheme.bits,)
    places = read_places(directory)
    return (8 * places["embeddings.word_embeddings.weight"].spec.dtype.itemsize,)


def _print_cpu(told: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"[bold]{told['model']} 在这台机器的 CPU 上写作要的内存（GB）："
        f"一起写 {told['batch_size']} 段，各读 {told['source_length']}、"
        f"写 {told['position']} 个词元[/bold]"
    )
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("权重的位数", "权重", "缓存", "运算", "合计", "够"):
        table.add_column(head, justify="right")
    for row in told["precisions"]:
        if row["bytes"] is None:
            table.add_row(str(row["bits"]), "不支持")
            continue
        each = [row["bytes"][name] for name in ("weights", "caches", "workspace")]
        fits = {True: "是", False: "否", None: "不知道"}[row["fits"]]
        numbers = (_gigabytes(count) for count in (*each, row["need_bytes"]))
        table.add_row(str(row["bits"]), *numbers, fits)
    console.print(table)
    if told["free_bytes"] is not None:
        console.print(f"可用的内存：{_gigabytes(told['free_bytes'])} GB。")
    console.print(f"乘法：{told['instructions']}。")


def _print_tables(model: str, costs: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    words = {"embeddings": "嵌入", "encoder": "编码器", "decoder": "解码器", "heads": "输出头"}
    words["total"] = "合计"
    source, position = costs["source_length"], costs["position"]
    tables = {
        f"{model} 的参数": {words[name]: f"{n:,}" for name, n in costs["parameters"].items()},
        "权重大小（int8、int4：编码层和解码层的矩阵量化，其余为 bf16）": {
            name: _megabytes(count) for name, count in costs["bytes"].items()
        },
        f"写作需要的显存（一起写 {costs['batch_size']} 段，各读 {source}、写 {position} 个词元）": {
            name: _megabytes(count) for name, count in costs["generation_bytes"].items()
        },
        "计算量（每词元的浮点运算）": {
            f"编码（原文 {source} 个词元）": _giga(costs["encoder_flops_per_token"]),
            "投影到交叉注意力（每个原文词元一次）": _giga(
                costs["cross_projection_flops_per_token"]
            ),
            f"写第 {position} 个词元（有缓存）": _giga(costs["decoder_flops_per_token"]),
        },
        "访存": {
            "写一个词元读取的权重": f"{costs['decoder_weights_per_token']:,} 个",
            "键值缓存，bf16，每词元": f"{costs['cache_bytes_per_token']:,} 字节",
        },
    }
    console = Console()
    for title, rows in tables.items():
        if not rows:
            continue
        table = Table(show_header=False, min_width=60)
        table.add_column(ratio=1)
        table.add_column(justify="right")
        for row in rows.items():
            table.add_row(*row)
        console.print(f"[bold]{title}[/bold]")
        console.print(table)


def _megabytes(count: int | None) -> str:
    return "不支持（宽度不是 128 的倍数）" if count is None else f"{count / 1e6:,.1f} MB"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.{1 if count > 1e11 else 2}f}"


def _giga(operations: int) -> str:
    return f"{operations / 1e9:,.3f} GFLOP"
