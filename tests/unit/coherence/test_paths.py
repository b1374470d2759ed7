"""How the things of a domain are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.daemon.config import load
from coherent_vfs.coherence.shm.paths import DomainPaths, socket_of, table_path

SPELLINGS = ["vt", "/vt", "/dev/shm/vt"]
TABLE = Path("/dev/shm/vt")


@pytest.mark.parametrize("text", SPELLINGS)
def test_each_spelling_is_the_same_domain(text: str) -> None:
    assert DomainPaths(text) == DomainPaths("vt")
    assert DomainPaths(text).name == load(None, {"table": text}).table == "vt"
    assert DomainPaths(text).table == table_path(text) == TABLE
    assert DomainPaths(text).leases == Path("/dev/shm/vt.leases")
    assert socket_of(text) == socket_of("vt")


@pytest.mark.parametrize("text", ["./vt", "a/vt", "/tmp/vt", "/dev/shm/a/vt", "//vt"])
def test_anything_else_is_the_path_of_a_file_and_no_domain(text: str) -> None:
    assert table_path(text) == Path(text)
    with pytest.raises(UserError, match="use one such as vt, without slashes"):
        DomainPaths(text)


@pytest.mark.parametrize("text", ["", "/", "..", "/..", ".vt", "v t", "vt\n", "n" * 201])
def test_what_cannot_be_a_table(text: str) -> None:
    with pytest.raises(UserError, match="table name"):
        DomainPaths(text)
