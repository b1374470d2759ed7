"""Whatever a guest sends, an operation answers with bytes or an OSError, and the share stays a share."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coherent_vfs.server.fuse.protocol import Opcode
from coherent_vfs.server.operations.table import PYTHON
from tests.unit.server.share import Call, Share

# SYNCFS reads nothing of its body, and waits for the disk.
OPCODES = sorted(set(PYTHON) - {Opcode.SYNCFS})

# Handles are made of small numbers: some of these are right.
words = st.one_of(
    st.sampled_from([0, 1, 2, 3, 7, 0xFFFFFFFF, 1 << 31, (1 << 31) - 1, 0o100644, 0o140000]),
    st.integers(0, 0xFFFFFFFF),
)
texts = st.one_of(
    st.sampled_from([b"a", b"b", b"..", b"../a", b"", b"user.x", b"trusted.coherence.domain", b"x" * 300]),
    st.binary(max_size=20),
).map(lambda text: text + b"\0")
bodies = st.one_of(
    st.binary(max_size=120),
    st.builds(
        lambda numbers, names: b"".join([*(each.to_bytes(4, "little") for each in numbers), *names]),
        st.lists(words, max_size=24),
        st.lists(texts, max_size=3),
    ),
)


@pytest.fixture(scope="module", autouse=True)
def small_files() -> Iterator[None]:
    """No request can fill the disk of who runs the tests."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_every_other_operation_is_served_in_python() -> None:
    assert {Opcode(each).name for each in PYTHON} == {
        *("SETATTR", "READLINK", "SYMLINK", "MKNOD", "MKDIR", "RMDIR", "RENAME", "RENAME2", "LINK"),
        *("TMPFILE", "FSYNC", "FSYNCDIR", "STATFS", "SYNCFS", "LSEEK", "FALLOCATE", "ACCESS"),
        *("COPY_FILE_RANGE", "COPY_FILE_RANGE_64", "SETXATTR", "GETXATTR", "LISTXATTR", "REMOVEXATTR"),
        *("SETUPMAPPING", "REMOVEMAPPING"),
    }


@settings(max_examples=600, deadline=None)
@given(requests=st.lists(st.tuples(st.sampled_from(OPCODES), st.integers(0, 3), bodies), max_size=8))
def test_any_body(requests: list[tuple[int, int, bytes]]) -> None:
    with TemporaryDirectory() as outer:
        root = Path(outer) / "root"
        root.mkdir()
        (root / "a").write_text("a")
        (root / "b").mkdir()
        share = Share(root)
        nodeids = [1, share.open("a")[0], share.open("b", os.O_RDONLY)[0], 77]
        for opcode, which, body in requests:
            try:
                reply = share.serve(Call(opcode, nodeids[which], body))
            except OSError as refused:
                assert refused.errno
            else:
                assert isinstance(reply, bytes)
        share.close()
        assert list(Path(outer).iterdir()) == [root]
