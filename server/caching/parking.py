"""What an operation in Python raises when it has to wait for others."""


class Parked(Exception):
    """The operation has to wait for others: it begins again later.

    Args:
        seconds: after which it does, if it is not woken before by a callback of the event loop, without which it
            would wait for ever; without, what it waits for says that.
    """
