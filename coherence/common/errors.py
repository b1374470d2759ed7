"""Errors that are meant for the person at the command line."""


class UserError(Exception):
    """Something the user can mend. The message is one line: the thing that is wrong, then the remedy."""
