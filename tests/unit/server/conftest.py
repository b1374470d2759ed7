"""The share that operations are tested on."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, count
from pathlib import Path

import pytest

from tests.unit.server.leased import LEASE_MAX, LeaseDomain, lease_domain
from tests.unit.server.share import Share

OLD_SHARES = 200
"""Made at a time."""


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Share]:
    """A writable share with extended attributes, in tmp_path; no umask, as in the backend."""
    umask = os.umask(0)
    served = Share(tmp_path)
    yield served
    served.close()
    os.umask(umask)


@pytest.fixture
def fails() -> Callable[[int], AbstractContextManager[None]]:
    """A context in which an OSError of that errno must be raised."""

    @contextmanager
    def context(code: int) -> Iterator[None]:
        with pytest.raises(OSError) as caught:
            yield
        assert caught.value.errno is not None
        assert errno.errorcode[caught.value.errno] == errno.errorcode[code]

    return context


@pytest.fixture(scope="session")
def old_shares(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Any number of directories with the same content, old enough for the longest leases on all of it."""
    return chain.from_iterable(old_ones(tmp_path_factory.mktemp("old")) for _ in count())


def old_ones(pool: Path) -> list[Path]:
    """Some of them, in a new directory."""
    for number in range(OLD_SHARES):
        share = pool / str(number)
        (share / "d").mkdir(parents=True)
        (share / "e").mkdir()
        for name in ("d/f", "d/g", "e/h", "e/i"):
            (share / name).write_bytes(b"content")
        (share / "link").symlink_to("d/f")
        os.mkfifo(share / "fifo")
    # A lease is a quarter of the age.
    end = time.time() + 4 * LEASE_MAX + 0.1
    while (left := end - time.time()) > 0:
        time.sleep(left)
    return sorted(pool.iterdir())


@pytest.fixture
def domain(old_shares: Iterator[Path]) -> LeaseDomain:
    """A domain on a directory that has not changed for a while; its guests come with domain.guest()."""
    return lease_domain(next(old_shares))
