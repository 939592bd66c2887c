"""What a server can be told: frozen data, without anything the extra [server] brings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import ArgumentError

DEFAULT_QUEUE = 64


@dataclass(frozen=True)
class ServerSettings:
    """How requests are taken in. Sizes in bytes, times in seconds."""

    max_queue: int = DEFAULT_QUEUE
    stream_interval: int = 1
    max_body_bytes: int = 4 << 20
    max_header_bytes: int = 64 << 10
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    keep_alive_s: float = 10.0
    drain_timeout_s: float = 30.0
    idle_unload_s: float = 0.0
    cors_origin: tuple[str, ...] = ()
    log_prompts: bool = False
    api_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_queue", "stream_interval", "max_body_bytes", "max_header_bytes"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("header_timeout_s", "body_timeout_s", "keep_alive_s", "drain_timeout_s", "idle_unload_s"):
            if not 0 <= getattr(self, name) < 1e9:
                raise ArgumentError(f"{name}: expected seconds, 0 or more, got {getattr(self, name)}")


def read_keys(key: str | None, file: Path | None) -> tuple[str, ...]:
    """The keys that open the server: the one given, and those in the file, one a line."""
    keys = [] if key is None else [key]
    if file is not None:
        lines = file.read_text(encoding="utf-8").splitlines()
        keys += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise ArgumentError(f"api_key_file: expected a key a line, got none in {file}")
    if not all(key.isascii() and key.isprintable() and key for key in keys):
        raise ArgumentError("api_key: expected printable ASCII characters, one at least")
    return tuple(keys)


@dataclass(frozen=True)
class ServeOptions:
    """The command line of `headrace serve`, besides the models and how they are loaded."""

    host: str = "127.0.0.1"
    port: int = 8000
    unix_socket: Path | None = None
    api_key: str | None = None
    api_key_file: Path | None = None
    max_concurrency: int = 16
    max_queue: int = DEFAULT_QUEUE
    stream_interval: int = 1
    kv_cache_memory: str | None = None
    cors_origin: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    drain_timeout: float = ServerSettings.drain_timeout_s
    idle_unload: float = 0.0
    header_timeout: float = ServerSettings.header_timeout_s
    body_timeout: float = ServerSettings.body_timeout_s
    max_body: str = "4MiB"
    log_prompts: bool = False

    def settings(self) -> ServerSettings:
        """What the application is told of it."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ArgumentError("tls_cert, tls_key: expected both or none")
        return ServerSettings(
            max_queue=self.max_queue,
            stream_interval=self.stream_interval,
            max_body_bytes=read_bytes("max_body", self.max_body),
            drain_timeout_s=self.drain_timeout,
            idle_unload_s=self.idle_unload,
            header_timeout_s=self.header_timeout,
            body_timeout_s=self.body_timeout,
            cors_origin=self.cors_origin,
            log_prompts=self.log_prompts,
            api_keys=read_keys(self.api_key, self.api_key_file),
        )


_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def read_bytes(name: str, text: str) -> int:
    """Bytes of "4GiB", "500MB" or "4096"."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([a-z]*)", text.strip().lower())
    unit = _UNITS.get(match[2]) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ArgumentError(f"{name}: expected bytes such as 4GiB or 500MB, got {text!r}")
    return int(float(match[1]) * unit)
