class HandleTable:
    live: int
    buffers: int
    def clear(self) -> None: ...
