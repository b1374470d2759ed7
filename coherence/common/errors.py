"""Errors that are meant for the person at the command line."""


class UserError(Exception):
    """Something the user can mend. The message is one line: the thing that is wrong, then the remedy."""


class OtherClock(UserError):
    """Times in shared memory are of another clock than this process's."""
