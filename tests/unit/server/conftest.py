"""The share that operations are tested on."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.unit.server.share import Share


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
