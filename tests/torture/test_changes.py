"""What random changes write."""

import random

from tests.torture.changes import Generator


def test_no_two_changes_write_the_same() -> None:
    """Else a race for a write could wait for something new in a file that has it already."""
    generator = Generator(random.Random(1))
    values = [generator.value() for _ in range(10_000)]
    assert len(set(values)) == len(values)
