"""A guest without a virtual machine: the file API on a share served by a vhost-user back-end."""

from __future__ import annotations

import errno
import os
from collections import Counter
from typing import Final, Self

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.shm.table import Table
from coherent_vfs.guest.cached import Hits, Rule, TableRule, TimeRule
from coherent_vfs.guest.dax import Dax, DaxMode
from coherent_vfs.guest.file_system import FileSystem
from coherent_vfs.guest.fuse_client import FuseClient
from coherent_vfs.guest.transport import Transport, VirtioTransport
from coherent_vfs.guest.window import Window
from coherent_vfs.server.fuse.protocol import KERNEL_MINOR_VERSION, ROOT_ID, InitFlag, Opcode

DOMAIN_XATTR: Final = b"trusted.coherence.domain"
"""Set on the root to the table's domain: the proof that this guest has mapped the table, and checks it."""


class Guest(FileSystem):
    """A mounted share; a with block unmounts it at its end. See FileSystem for what it can do.

    With a table, the guest proves to the back-end that it checks it. A back-end in another mode than shared
    refuses the proof; then `aware` is False, and time decides as in a guest without a table.

    Args:
        transport: carries FUSE messages; owned by the guest.
        table: the domain's version table, mapped read-only; owned by the guest.
        max_names: names to keep at most.
        max_pages: pages of 4 KiB to keep at most.
        minor: the newest FUSE minor version to ask for.
        window: where the back-end maps files; None where it does not.
        dax: which files to read and write through the window.

    Raises:
        UserError: dax "always" without a window.
    """

    def __init__(
        self,
        transport: Transport,
        table: Table | None = None,
        *,
        max_names: int = 65536,
        max_pages: int = 16384,
        minor: int = KERNEL_MINOR_VERSION,
        window: Window | None = None,
        dax: DaxMode = "never",
    ) -> None:
        if dax == "always" and window is None:
            raise UserError("dax=always: the back-end has no window: start it with one, or use dax=inode")
        self._transport = transport
        self._table = table
        self._closed = False
        offered = InitFlag(0)
        if dax != "never" and window is not None:
            offered |= InitFlag.MAP_ALIGNMENT
        if dax == "inode":
            offered |= InitFlag.HAS_INODE_DAX
        client = FuseClient(transport, minor=minor, offered=offered)
        rule: Rule = TimeRule()
        if table is not None and _prove(client, table):
            rule = TableRule(table)
        files = None if dax == "never" or window is None else Dax(client, window, dax)
        super().__init__(client, rule, max_names=max_names, max_pages=max_pages, dax=files)

    @classmethod
    def connect(
        cls,
        socket_path: str | os.PathLike[str],
        *,
        table: str | os.PathLike[str] | None = None,
        timeout: float = 30.0,
        request_queues: int = 1,
        max_names: int = 65536,
        max_pages: int = 16384,
        minor: int = KERNEL_MINOR_VERSION,
        dax: DaxMode = "never",
    ) -> Self:
        """Attach to a back-end and mount its share.

        Args:
            socket_path: the back-end's vhost-user socket.
            table: the domain's version table, such as "/dev/shm/vt"; None for a guest that checks none.
            timeout: seconds to wait for any answer.
            request_queues: request queues to use, if the back-end has as many.
            max_names, max_pages, minor, dax: as of Guest.

        Raises:
            UserError: no back-end there, or no table that can be used; or no window, and dax is "always".
            OSError: the back-end does not serve a file system as it should.
        """
        mapped = None if table is None else Table.open(table)
        try:
            transport = VirtioTransport(
                socket_path, timeout=timeout, request_queues=request_queues, window=dax != "never"
            )
            try:
                return cls(
                    transport,
                    mapped,
                    max_names=max_names,
                    max_pages=max_pages,
                    minor=minor,
                    window=transport.window,
                    dax=dax,
                )
            except BaseException:
                transport.close()
                raise
        except BaseException:
            if mapped is not None:
                mapped.close()
            raise

    @property
    def aware(self) -> bool:
        """Whether the version table decides what is good."""
        return self.tree.rule.aware

    @property
    def requests(self) -> Counter[Opcode]:
        """How many requests of each operation were sent."""
        return self.client.requests

    @property
    def hits(self) -> Hits:
        """How often the cache answered in place of a request."""
        return self.tree.cache.hits

    @property
    def mapped(self) -> int:
        """Bytes of files that are mapped in the window."""
        return 0 if self.tree.dax is None else self.tree.dax.mapped

    def close(self) -> None:
        """Unmount (DESTROY) and detach. May be called twice; a dead back-end is no error."""
        if self._closed:
            return
        self._closed = True
        self.tree.cache.drop()
        self.client.close()
        self._transport.close()
        if self._table is not None:
            self._table.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _prove(client: FuseClient, table: Table) -> bool:
    try:
        client.setxattr(ROOT_ID, DOMAIN_XATTR, table.domain, 0)
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.EIO, errno.ETIMEDOUT):
            raise
        return False
    return True
