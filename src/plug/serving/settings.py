"""`ServeSettings`: where the server listens, whom it lets in, how much it takes on.

The command line of `plug serve` and the table in `docs/serving.md` are made from it.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from plug.errors import UsageError
from plug.options import Bool, Float, Int, Strings, Text, check_options, option

MIN_KEY_LENGTH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """Options of the server, not of its models."""

    host: str = option(
        "127.0.0.1", Text(255),
        "监听的地址；0.0.0.0 为所有网卡，这时必须有密钥。",
        "address to listen on; one that other machines reach needs a key",
    )  # fmt: skip
    port: int = option(
        8000, Int(0, 65535),
        "监听的端口，0 为任取一个空闲的。",
        "0 takes a free one",
    )  # fmt: skip
    uds: str | None = option(
        None, Text(100),
        "改为监听这个路径的 Unix 套接字。",
        "path of a Unix socket to listen on instead",
        unset=("不用", "None: off"),
    )  # fmt: skip
    root_path: str = option(
        "", Text(255),
        "反向代理加在路径前面的部分，如 /plug。",
        "what a proxy puts before the paths, such as `/plug`",
        unset=("为空", "empty"),
    )  # fmt: skip
    api_key: tuple[str, ...] = option(
        (), Strings(64, 200),
        "密钥，客户端以 Authorization: Bearer 密钥 发送；可重复。会出现在进程列表里，"
        "多人的机器请用 --api-key-file。",
        "key that clients must send; repeatable; other users of the machine can see it, so that "
        "`api_key_file` is better",
    )  # fmt: skip
    api_key_file: str | None = option(
        None, Text(4096),
        "密钥文件，一行一个。",
        "file of keys, one a line; `#` begins a comment",
        unset=("不用", "None: off"),
    )  # fmt: skip
    allow_unauthenticated: bool = option(
        False, Bool(),
        "没有密钥也对别的机器开放。",
        "serve other machines without a key",
    )  # fmt: skip
    models_dir: str | None = option(
        None, Text(4096),
        "允许用 /v1/models/load 在运行时载入这个目录下的模型。",
        "directory whose subdirectories `/v1/models/load` may load while the server runs",
        unset=("不允许", "None: off"),
    )  # fmt: skip
    replicas: int = option(
        1, Int(1, 64),
        "几个相同的副本，由 Ray Serve 分派请求（需要安装 ray）；一个副本用一张显卡。",
        "copies of the server, behind Ray Serve's proxy (extra `ray`); on GPUs one card each",
    )  # fmt: skip
    max_num_seqs: int = option(
        16, Int(1, 1024),
        "同时写的段数，与 vLLM 的同名选项相同。",
        "texts written at once, as in vLLM",
    )  # fmt: skip
    max_num_batched_tokens: int | None = option(
        None, Int(1, 1_000_000),
        "一步里最多编码多少个输入词元；小则首字快、正在写的不停顿，大则总的快。",
        "source tokens encoded in one step; the others wait for the next, so that what runs is not "
        "held up by all sources that came together",
        unset=("CPU 上 256，显卡上 16384", "256 on a CPU, 16384 on a GPU"),
    )  # fmt: skip
    gpu_memory_utilization: float = option(
        0.9, Float(0.01, 1),
        "显存里本进程可以用的比例，与 vLLM 的同名选项相同；CPU 上无效。",
        "share of a card's memory that this process may use, as in vLLM; nothing on a CPU",
    )  # fmt: skip
    max_waiting: int = option(
        256, Int(1, 100_000),
        "排队的段数，再多就答 429。",
        "texts that may wait; beyond it the answer is 429",
    )  # fmt: skip
    max_waiting_tokens: int = option(
        65_536, Int(1, 100_000_000),
        "排队的各段要读的词元总数，再多就答 429。",
        "source tokens of all texts that wait; beyond it the answer is 429",
    )  # fmt: skip
    max_output_tokens: int = option(
        4096, Int(1, 100_000),
        "max_tokens 的上限。",
        "highest `max_tokens` of a request",
    )  # fmt: skip
    max_choices: int = option(
        32, Int(1, 1024),
        "一次请求写的段数（prompt 的个数 × n 或 best_of）的上限。",
        "texts of one request: prompts times `n` or `best_of`",
    )  # fmt: skip
    max_prompt_chars: int = option(
        65_536, Int(1, 10_000_000),
        "一段输入的字数上限。",
        "characters of one input",
    )  # fmt: skip
    max_body_bytes: int = option(
        2**20, Int(1, 2**30),
        "请求正文的字节数上限。",
        "bytes of a request's body",
    )  # fmt: skip
    request_timeout: float = option(
        600.0, Float(0.01, 86_400),
        "一个请求最多用多少秒。",
        "seconds from the arrival of a request to its end",
    )  # fmt: skip
    shutdown_timeout: float = option(
        60.0, Float(0.01, 86_400),
        "收到 SIGTERM 后，正在写的请求最多再写多少秒。",
        "seconds that running requests have after SIGTERM",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise UsageError(f"root_path={self.root_path!r} 应以 / 开头，不以 / 结尾，如 /plug。")
        if self.api_key_file is not None:
            keys = (*self.api_key, *read_keys(Path(self.api_key_file)))
            object.__setattr__(self, "api_key", keys)
        for key in self.api_key:
            if not re.fullmatch(rf"[!-~]{{{MIN_KEY_LENGTH},}}", key):
                raise UsageError(
                    f"密钥应是 {MIN_KEY_LENGTH} 个以上的可见 ASCII 字符，不含空格。"
                    "可以用 openssl rand -hex 24 生成。"
                )
        if self.models_dir is not None and not Path(self.models_dir).is_dir():
            raise UsageError(f"--models-dir {self.models_dir} 不是目录。请检查路径。")
        if self.is_public and not self.api_key and not self.allow_unauthenticated:
            raise UsageError(
                f"--host {self.host} 会让别的机器连进来，却没有密钥。请加 --api-key-file；"
                "确实要对所有人开放时加 --allow-unauthenticated。"
            )

    @property
    def is_public(self) -> bool:
        """Whether other machines can connect."""
        return self.uds is None and not is_local(self.host)


def is_local(host: str) -> bool:
    """Whether a name or address means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; blank lines and those that begin with # are left out.

    Raises:
        UsageError: the file cannot be read, or has no key.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(f"读不了密钥文件 {path}：{error.strerror}。") from None
    except UnicodeDecodeError:
        raise UsageError(f"密钥文件 {path} 不是 UTF-8 文本。") from None
    keys = [line.strip() for line in lines]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise UsageError(f"密钥文件 {path} 里没有密钥。请一行写一个。")
    return tuple(keys)
