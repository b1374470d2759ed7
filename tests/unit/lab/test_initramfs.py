"""The archive that a guest's kernel unpacks, and the modules in it."""

from __future__ import annotations

import lzma
import stat
from pathlib import Path

from tests.lab import initramfs


def test_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    packed = initramfs.pack({"a/b/file": initramfs.text("content\n"), "run": (stat.S_IFREG | 0o755, b"\0\xff")})

    entries = walk(packed)
    assert {name: mode for name, (mode, _) in entries.items() if name != "TRAILER!!!"} == {
        "a": stat.S_IFDIR | 0o755,
        "a/b": stat.S_IFDIR | 0o755,
        "a/b/file": stat.S_IFREG | 0o644,
        "run": stat.S_IFREG | 0o755,
    }
    assert entries["a/b/file"][1] == b"content\n"
    assert entries["run"][1] == b"\0\xff"
    assert list(entries)[-1] == "TRAILER!!!"


def walk(packed: bytes) -> dict[str, tuple[int, bytes]]:
    """Names, modes and contents of a newc archive."""
    entries = {}
    at = 0
    while at < len(packed):
        assert packed[at : at + 6] == b"070701"
        fields = [int(packed[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = packed[at + 110 : at + 110 + name_size].rstrip(b"\0").decode()
        start = at + 110 + name_size
        start += -start % 4
        entries[name] = (mode, packed[start : start + size])
        at = start + size
        at += -at % 4
    return entries


def test_modules_come_after_what_they_depend_on(tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    (tmp_path / "modules.builtin").write_text("kernel/drivers/virtio/virtio.ko\n")
    for name, depends in {"base": "", "middle_one": "base,virtio", "top": "middle-one"}.items():
        data = f"\0name={name}\0depends={depends}\0".encode()
        (tmp_path / f"kernel/{name.replace('_', '-')}.ko.xz").write_bytes(lzma.compress(data))
    loaded = initramfs.modules(tmp_path, ["top", "virtio"])
    assert list(loaded) == ["base.ko", "middle_one.ko", "top.ko"]
    assert b"name=top" in loaded["top.ko"]
