"""`ParallelSettings`: the `[parallel]` table, how a run is spread over processes and their cards.

Its one home: `plug finetune` and `plug pretrain` read it. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from plug.errors import UsageError
from plug.options import Bool, Choice, Int, Text, check_options, option

SHARDING = ("auto", "none", "fsdp")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelSettings:
    """How the processes that `torchrun` or `deepspeed` starts share a model.

    Raises:
        UsageError: a value is not accepted, or two options exclude each other.
    """

    sharding: str = option(
        "auto", Choice(SHARDING),
        "多进程时模型怎样放：none 每个进程一份；fsdp 分片，每个进程只有一部分（FSDP2）；"
        "auto 一张卡放得下就用 none，放不下就用 fsdp。",
        "where several processes keep the model: a copy in each (`none`), or a shard of each "
        "layer in each (`fsdp`: FSDP2 of PyTorch). `auto`: `none` if weights, gradients and "
        "optimizer states fit on one card, else `fsdp`",
    )  # fmt: skip
    tensor: int = option(
        1, Int(1, 1024),
        "张量并行：几个进程合算每一层（各有一部分注意力头和中间维度），其余的进程分数据。"
        "要整除进程数；多于 1 时模型用 fsdp 分片。",
        "tensor parallelism: how many processes compute each layer together, each some of its "
        "heads and inner values; groups of so many share the batch. Divides the number of "
        "processes. Above 1 the model is sharded as well (`fsdp`)",
    )  # fmt: skip
    cpu_offload: bool = option(
        False, Bool(),
        "fsdp：分片、梯度和优化器的状态放在内存里，显存只放正在算的层。",
        "with `fsdp`: shards, gradients and optimizer states stay in the host's memory; a card "
        "holds the layers that are computed. Slower",
    )  # fmt: skip
    reshard_after_forward: bool = option(
        True, Bool(),
        "fsdp：前向算完一层就放掉别的进程的部分，反向时再取。关掉更快，更占显存。",
        "with `fsdp`: free the other processes' shards of a layer after its forward pass, and "
        "gather them again for the backward pass. False is faster and takes more memory",
    )  # fmt: skip
    deepspeed: str = option(
        "", Text(4096),
        "DeepSpeed 的设置文件（JSON，如 ZeRO-3）；用 deepspeed 启动。不能与 fsdp 一起用。",
        "a DeepSpeed configuration (JSON, such as ZeRO-3), for runs that the `deepspeed` launcher "
        "starts; in place of `fsdp`",
        ("不用", "none"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)
        if self.deepspeed and self.sharding == "fsdp":
            raise UsageError("parallel.deepspeed 和 parallel.sharding=fsdp 只能用其中一个。")
        if self.cpu_offload and (self.sharding == "none" or self.deepspeed):
            raise UsageError(
                "parallel.cpu_offload 只用于 parallel.sharding=fsdp。"
                "请去掉它（DeepSpeed 的 offload 写在它自己的文件里），或改用 fsdp。"
            )
        if self.tensor > 1 and (self.sharding == "none" or self.deepspeed):
            raise UsageError(
                f"parallel.tensor={self.tensor} 与 parallel.sharding=fsdp 一起用："
                "请去掉 sharding=none 和 deepspeed。"
            )

    @property
    def asked(self) -> str:
        """`sharding`, where "auto" leaves a choice: another option may need shards."""
        return "fsdp" if self.tensor > 1 or self.cpu_offload else self.sharding
