"""The layouts against the kernel's own header, compiled here; the fields against the layouts."""

import shutil
import subprocess
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import pytest

from coherent_vfs.server.fuse import protocol

SIZES = {
    "fuse_in_header": protocol.IN_HEADER.size,
    "fuse_out_header": protocol.OUT_HEADER.size,
    "fuse_init_in": protocol.INIT_IN.size,
    "fuse_init_out": protocol.INIT_OUT.size,
    "fuse_attr": protocol.ATTR.size,
    "fuse_entry_out": protocol.ENTRY_OUT_SIZE,
    "fuse_attr_out": protocol.ATTR_OUT_SIZE,
    "fuse_forget_in": protocol.FORGET_IN.size,
    "fuse_batch_forget_in": protocol.BATCH_FORGET_IN.size,
    "fuse_forget_one": protocol.FORGET_ONE.size,
    "fuse_getattr_in": protocol.GETATTR_IN.size,
    "fuse_setattr_in": protocol.SETATTR_IN.size,
    "fuse_mknod_in": protocol.MKNOD_IN.size,
    "fuse_mkdir_in": protocol.MKDIR_IN.size,
    "fuse_rename_in": protocol.RENAME_IN.size,
    "fuse_rename2_in": protocol.RENAME2_IN.size,
    "fuse_link_in": protocol.LINK_IN.size,
    "fuse_access_in": protocol.ACCESS_IN.size,
    "fuse_open_in": protocol.OPEN_IN.size,
    "fuse_create_in": protocol.CREATE_IN.size,
    "fuse_open_out": protocol.OPEN_OUT.size,
    "fuse_release_in": protocol.RELEASE_IN.size,
    "fuse_flush_in": protocol.FLUSH_IN.size,
    "fuse_read_in": protocol.READ_IN.size,
    "fuse_write_in": protocol.WRITE_IN.size,
    "fuse_write_out": protocol.WRITE_OUT.size,
    "fuse_fsync_in": protocol.FSYNC_IN.size,
    "fuse_lseek_in": protocol.LSEEK_IN.size,
    "fuse_lseek_out": protocol.LSEEK_OUT.size,
    "fuse_fallocate_in": protocol.FALLOCATE_IN.size,
    "fuse_copy_file_range_in": protocol.COPY_FILE_RANGE_IN.size,
    "fuse_lk_in": protocol.LK_IN.size,
    "fuse_lk_out": protocol.LK_OUT.size,
    "fuse_interrupt_in": protocol.INTERRUPT_IN.size,
    "fuse_dirent": protocol.DIRENT.size,
    "fuse_direntplus": protocol.DIRENTPLUS_NAME_OFFSET,
    "fuse_statfs_out": protocol.KSTATFS.size,
    "fuse_syncfs_in": protocol.SYNCFS_IN.size,
    "fuse_setxattr_in": protocol.SETXATTR_IN.size,
    "fuse_getxattr_in": protocol.GETXATTR_IN.size,
    "fuse_getxattr_out": protocol.GETXATTR_OUT.size,
    "fuse_secctx": protocol.SECCTX.size,
    "fuse_secctx_header": protocol.SECCTX_HEADER.size,
    "fuse_ext_header": protocol.EXT_HEADER.size,
    "fuse_setupmapping_in": protocol.SETUPMAPPING_IN.size,
    "fuse_removemapping_in": protocol.REMOVEMAPPING_IN.size,
    "fuse_removemapping_one": protocol.REMOVEMAPPING_ONE.size,
}

HEADER = Path("/usr/include/linux/fuse.h")


def evaluate(expressions: list[str], directory: Path) -> list[int]:
    """The values of C expressions over <linux/fuse.h>."""
    probe = directory / "probe.c"
    probe.write_text(
        "#include <stdio.h>\n#include <linux/fuse.h>\nint main(void) {\n"
        + "".join(f'  printf("%lld\\n", (long long)({each}));\n' for each in expressions)
        + "}\n"
    )
    program = directory / "probe"
    subprocess.run(["cc", "-o", program, probe], check=True)
    return [int(line) for line in subprocess.run([program], check=True, stdout=-1).stdout.split()]


@pytest.fixture(scope="module")
def header() -> str:
    if shutil.which("cc") is None or not HEADER.exists():
        pytest.skip("needs a C compiler and linux-libc-dev")
    return HEADER.read_text()


def test_sizes_are_the_headers(header: str, tmp_path: Path) -> None:
    known = [name for name in SIZES if f"struct {name} {{" in header]
    assert len(known) > 40
    measured = evaluate([f"sizeof(struct {name})" for name in known], tmp_path)
    assert dict(zip(known, measured, strict=True)) == {name: SIZES[name] for name in known}


def test_numbers_are_the_headers(header: str, tmp_path: Path) -> None:
    ours: dict[str, int] = {}
    for prefix, enumeration in (
        ("FUSE_", protocol.Opcode),
        ("FUSE_", protocol.InitFlag),
        ("FATTR_", protocol.FattrFlag),
        ("FOPEN_", protocol.OpenFlag),
        ("FUSE_WRITE_", protocol.WriteFlag),
        ("FUSE_RELEASE_", protocol.ReleaseFlag),
        ("FUSE_ATTR_", protocol.AttrFlag),
        ("FUSE_SETUPMAPPING_FLAG_", protocol.SetupMappingFlag),
        ("FUSE_NOTIFY_", protocol.NotifyCode),
    ):
        # Opcode.NOTIFY_REPLY shares its prefix with the notifications, no name is in two of these.
        ours |= {prefix + name: int(value) for name, value in enumeration.__members__.items()}
    words = set(header.split())
    known = [name for name in ours if name in words]
    assert len(known) > 110
    measured = evaluate(known, tmp_path)
    unsigned = [value % (1 << 32) if -(1 << 31) <= value < 0 else value for value in measured]
    assert dict(zip(known, unsigned, strict=True)) == {name: ours[name] for name in known}


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        (protocol.IN_HEADER, protocol.InHeader),
        (protocol.INIT_IN, protocol.InitIn),
        (protocol.INIT_OUT, protocol.InitOut),
        (protocol.ATTR, protocol.Attr),
        (protocol.ENTRY_OUT, protocol.EntryOut),
        (protocol.SETATTR_IN, protocol.SetattrIn),
        (protocol.KSTATFS, protocol.Kstatfs),
    ],
)
def test_fields_fit_their_layout(layout: Struct, fields: type[NamedTuple]) -> None:
    assert len(layout.unpack(bytes(layout.size))) == len(fields._fields)


def test_setattr_fields_stand_where_the_header_has_them(header: str, tmp_path: Path) -> None:
    fields = protocol.SetattrIn._fields
    offsets = evaluate([f"__builtin_offsetof(struct fuse_setattr_in, {name})" for name in fields], tmp_path)
    for index, offset in enumerate(offsets):
        body = bytearray(protocol.SETATTR_IN.size)
        body[offset] = 1
        values = protocol.SETATTR_IN.unpack(body)
        assert values[index] == 1
        assert sum(values) == 1


def test_directory_entries_are_padded_to_eight_bytes() -> None:
    assert [protocol.dirent_size(length) for length in (1, 8, 9)] == [32, 32, 40]
    assert [protocol.direntplus_size(length) for length in (1, 8, 9)] == [160, 160, 168]
