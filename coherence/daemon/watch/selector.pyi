"""What asyncio waits with, and one descriptor that does not wait for asyncio."""

from collections.abc import Callable
from selectors import EpollSelector

class FirstSelector(EpollSelector):
    """Serves a descriptor as soon as it is readable, before the event loop does anything else.

    The descriptor is served while it is registered for reading, as it is by add_reader of the loop, which is never
    told of it.

    Args:
        fd: the descriptor.
        serve: reads from it, and waits for nothing. What is not read by that it is called for again.
    """

    def __init__(self, fd: int, serve: Callable[[], object]) -> None: ...
