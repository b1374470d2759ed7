from collections.abc import Callable

from coherent_vfs.server.session.file_system import FileSystem
from coherent_vfs.server.virtio.virtqueue import Virtqueue

class RequestQueue:
    ring: Virtqueue
    kick_fd: int
    def __init__(
        self,
        ring: Virtqueue,
        fs: FileSystem,
        kick: int | None,
        call: int | None,
        err: int | None,
        patient: bool,
        on_broken: Callable[[], None],
    ) -> None: ...
    @property
    def base(self) -> int: ...
    def enable(self, enabled: bool) -> None: ...
    def replace_call(self, call: int | None) -> None: ...
    def replace_err(self, err: int | None) -> None: ...
    def interrupt(self) -> None: ...
    @property
    def parked(self) -> int: ...
    def close(self) -> None: ...
