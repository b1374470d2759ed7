from coherent_vfs.server.virtio.guest_memory import GuestMemory

MAX_QUEUE_SIZE: int

class Virtqueue:
    event_idx: bool
    broken: bool
    memory: GuestMemory
    def __init__(
        self, memory: GuestMemory, size: int, desc: int, avail: int, used: int, base: int, event_idx: bool
    ) -> None: ...
    @property
    def base(self) -> int: ...
    def rebind(self) -> None: ...
