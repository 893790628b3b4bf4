"""`ServeSettings`: where the server listens, whom it lets in, how much it takes on."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from plug.errors import UsageError

MIN_KEY_LENGTH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """Options of the server, not of its models.

    Attributes:
        host: address to listen on.
        port: 0 takes a free one.
        uds: path of a Unix socket to listen on instead.
        root_path: what a proxy puts before the paths, such as "/plug".
        api_keys: whoever sends one of these is let in; none: everybody is.
        allow_unauthenticated: serve a public address without a key.
        max_num_seqs: texts written at once, as in vLLM.
        max_waiting: texts that may wait for a place.
        max_waiting_tokens: source tokens of all texts that wait.
        max_tokens: that a request may ask for.
        max_choices: texts of one request: prompts times `n` (or `best_of`).
        max_prompt_chars: characters of a prompt or another text.
        max_body_bytes: of a request.
        request_timeout: seconds from arrival to the last byte.
        shutdown_timeout: seconds that running requests have after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    root_path: str = ""
    api_keys: tuple[str, ...] = ()
    allow_unauthenticated: bool = False
    max_num_seqs: int = 16
    max_waiting: int = 256
    max_waiting_tokens: int = 65_536
    max_tokens: int = 4096
    max_choices: int = 32
    max_prompt_chars: int = 65_536
    max_body_bytes: int = 2**20
    request_timeout: float = 600.0
    shutdown_timeout: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_waiting", "max_waiting_tokens", "max_tokens",
                     "max_choices", "max_prompt_chars", "max_body_bytes"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} 应不小于 1。")
        if not 0 <= self.port < 65_536:
            raise UsageError(f"port={self.port} 应在 0 到 65535 之间。")
        for name in ("request_timeout", "shutdown_timeout"):
            if not 0 < getattr(self, name) < 1e6:
                raise UsageError(f"{name}={getattr(self, name)} 应大于 0，单位是秒。")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise UsageError(f"root_path={self.root_path!r} 应以 / 开头，不以 / 结尾，如 /plug。")
        for key in self.api_keys:
            if not re.fullmatch(rf"[!-~]{{{MIN_KEY_LENGTH},}}", key):
                raise UsageError(
                    f"密钥应是 {MIN_KEY_LENGTH} 个以上的可见 ASCII 字符，不含空格。"
                    "可以用 openssl rand -hex 24 生成。"
                )
        if self.is_public and not self.api_keys and not self.allow_unauthenticated:
            raise UsageError(
                f"--host {self.host} 会让别的机器连进来，却没有密钥。请加 --api-key 或 "
                "--api-key-file；确实要对所有人开放时加 --allow-unauthenticated。"
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
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise UsageError(f"密钥文件 {path} 里没有密钥。请一行写一个。")
    return tuple(keys)
