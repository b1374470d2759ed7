"""The daemon's settings: what a TOML file and flags may say (packaging/coherenced.toml explains each)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.common.log import Level
from coherent_vfs.coherence.common.sizes import parse_size
from coherent_vfs.coherence.daemon.metrics import address
from coherent_vfs.coherence.daemon.watch.host_watch import Kind
from coherent_vfs.coherence.shm.paths import DomainPaths, socket_of
from coherent_vfs.coherence.shm.table import DEFAULT_SLOT_COUNT, MAX_SLOT_COUNT, MIN_SLOT_COUNT


class Config(Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """The settings of one coherenced.

    Args:
        table: the name of the table.
        slots: how many slots a new table gets, a power of two.
        socket: path of the control socket, None for the one that belongs to the table.
        socket_mode: its permission bits, octal digits.
        socket_group: group of the socket and, for reading, of the table; None for the daemon's own.
        dax_window: the largest DAX window that a guest may have, such as 64G.
        dax_total: how large all of them together may be.
        watch: how changes on the host are seen.
        max_watches: how many directories and files are watched at most, None for as many as the system allows.
        realtime: whether the daemon runs before ordinary processes.
        metrics: a port or a Unix socket for Prometheus, None for nowhere.
        log_level: the least severe level to log.
        log_json: whether logs are JSON objects.
    """

    table: str = "vt"
    slots: Annotated[int, Meta(ge=MIN_SLOT_COUNT, le=MAX_SLOT_COUNT)] = DEFAULT_SLOT_COUNT
    socket: str | None = None
    socket_mode: str = "0660"
    socket_group: str | None = None
    dax_window: str = "64G"
    dax_total: str = "256G"
    watch: Kind = "inotify"
    max_watches: Annotated[int, Meta(ge=1)] | None = None
    realtime: bool = False
    metrics: str | None = None
    log_level: Level = "warn"
    log_json: bool = False

    def __post_init__(self) -> None:
        if self.slots & (self.slots - 1):
            raise ValueError(f"slots is {self.slots}: use a power of two")
        if not re.fullmatch("0?[0-7]{3}", self.socket_mode):
            raise ValueError(f"socket-mode is {self.socket_mode!r}: use octal digits such as 0660")
        for name, size in ("dax-window", self.dax_window), ("dax-total", self.dax_total):
            try:
                parse_size(size)
            except ValueError as error:
                raise ValueError(f"{name} is {size!r}: {error}") from None
        if self.metrics is not None:
            try:
                address.parse(self.metrics)
            except ValueError as error:
                raise ValueError(f"metrics is {self.metrics!r}: {error}") from None
        try:
            msgspec.structs.force_setattr(self, "table", DomainPaths(self.table).name)
        except UserError as error:
            raise ValueError(str(error)) from None

    @property
    def paths(self) -> DomainPaths:
        """Where the table and what belongs to it are."""
        return DomainPaths(self.table)

    @property
    def socket_path(self) -> Path:
        """Where the control socket is."""
        return Path(self.socket) if self.socket is not None else socket_of(self.table)

    @property
    def dax_limits(self) -> tuple[int, int]:
        """Of a window, and of all that is mapped, bytes."""
        return parse_size(self.dax_window), parse_size(self.dax_total)

    @property
    def metrics_address(self) -> address.Address | None:
        """Where metrics are served."""
        return None if self.metrics is None else address.parse(self.metrics)

    @property
    def socket_bits(self) -> int:
        """The socket's permission bits."""
        return int(self.socket_mode, 8)


def load(path: Path | None, flags: dict[str, Any]) -> Config:
    """The settings of a file, if there is one, overruled by flags.

    Args:
        path: of a TOML file.
        flags: settings by their names in the file, such as "socket-mode".

    Raises:
        UserError: the file cannot be read or a setting is wrong; the message names file and setting.
    """
    settings: dict[str, Any] = {}
    if path is not None:
        try:
            settings = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: name a readable file with --config") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not TOML: {error}") from None
    try:
        msgspec.convert(settings, Config)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {error}") from None
    try:
        return msgspec.convert(settings | flags, Config)
    except msgspec.ValidationError as error:
        raise UserError(f"command line: {error}") from None
