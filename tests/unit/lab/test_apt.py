"""Trees of packages are made whole or not at all, and made again only when what they are made from changed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.lab import apt
from tests.lab.paths import LabError


@pytest.fixture(autouse=True)
def trees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(apt, "TREES", tmp_path / "trees")
    return tmp_path / "trees"


@pytest.fixture
def deb(tmp_path: Path) -> Path:
    """A small package."""
    root = tmp_path / "package"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: lab-test\nVersion: 1\nArchitecture: all\nMaintainer: Lab <lab@example.org>\nDescription: test\n"
    )
    (root / "usr").mkdir()
    (root / "usr/file").write_text("from the package\n")
    package = tmp_path / "lab-test.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", root, package], check=True, capture_output=True)
    return package


def unpack(deb: Path, key: str = "key") -> Path:
    said: list[str] = []
    return apt.unpack("tree", key, lambda: [deb], lambda tree: None, said.append)


def test_tree_is_unpacked_once(deb: Path, trees: Path) -> None:
    tree = unpack(deb)
    assert (tree / "usr/file").read_text() == "from the package\n"
    deb.unlink()
    assert unpack(deb) == tree


def test_tree_is_made_again_when_it_is_to_be_another(deb: Path) -> None:
    tree = unpack(deb)
    (tree / "usr/file").write_text("old")
    unpack(deb, key="another key")
    assert (tree / "usr/file").read_text() == "from the package\n"


def test_set_up_that_was_cut_off_is_done_again(deb: Path, trees: Path) -> None:
    def cut_off() -> Iterable[Path]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apt.unpack("tree", "key", cut_off, lambda tree: None, lambda line: None)
    (trees / "tree.partial/rest").write_text("of the attempt that was cut off")
    tree = unpack(deb)
    assert sorted(path.name for path in tree.iterdir()) == ["usr"]
    assert not (trees / "tree.partial").exists()


def test_damaged_package_is_removed_and_fetched_the_next_time(deb: Path, trees: Path) -> None:
    whole = deb.read_bytes()
    deb.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LabError, match=r"lab-test\.deb is damaged and was removed: run the set-up again"):
        unpack(deb)
    assert not deb.exists()
    assert not (trees / "tree").exists()
    deb.write_bytes(whole)
    assert (unpack(deb) / "usr/file").exists()


def test_mirror_is_the_machines_own() -> None:
    if not apt.is_debian():
        pytest.skip("no Debian machine")
    address = apt.mirror()
    assert "://" in address or address.startswith("file:")
