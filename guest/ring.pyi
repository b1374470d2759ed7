from mmap import mmap

DESCRIPTORS_PER_SLOT: int

class Ring:
    slots: int
    size: int
    descriptors: int
    available: int
    used: int
    end: int
    def __init__(
        self,
        memory: mmap | bytearray,
        start: int,
        slots: int,
        request_bytes: int,
        reply_bytes: int,
        indirect: bool,
        event_idx: bool,
    ) -> None: ...
    def close(self) -> None: ...
    def place(
        self,
        slot: int,
        header: bytes,
        arguments: bytes,
        data: bytes | bytearray | memoryview,
        reply_bytes: int,
    ) -> None: ...
    def publish(self, slot: int) -> bool: ...
    def reap(self) -> list[tuple[int, int]]: ...
    def arm(self) -> bool: ...
    def reply(self, slot: int, length: int) -> bytes: ...
