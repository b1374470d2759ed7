"""The FUSE wire format, version 7.45 (Linux include/uapi/linux/fuse.h): numbers, flags and layouts.

Everything on the wire is little-endian here, since the hosts and guests we serve are. A request is
`IN_HEADER`, then the operation's `*_IN` body, then names or data; a reply is `OUT_HEADER`, then the
operation's `*_OUT` body, then data. Padding is left out of the fields: it is packed as zeros and
skipped when unpacked. The comment over each layout names its fields in order; the layouts with many
fields have a NamedTuple too: `Attr._make(ATTR.unpack(data))`, `ATTR.pack(*attr)`.

Times are signed here although the header declares them unsigned: the kernel casts a signed time.
"""

from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final, NamedTuple

KERNEL_VERSION: Final = 7
KERNEL_MINOR_VERSION: Final = 45
ROOT_ID: Final = 1

MIN_READ_BUFFER: Final = 8192
"""Smallest buffer that a server may read requests into, bytes."""
MAX_MAX_PAGES: Final = 256
"""Largest INIT max_pages that every kernel accepts (the fs.fuse.max_pages_limit default), in pages."""
NAME_MAX: Final = 255
"""Longest file name, bytes."""
XATTR_NAME_MAX: Final = 255
"""Longest extended attribute name, bytes (linux/limits.h)."""
XATTR_SIZE_MAX: Final = 65536
"""Largest extended attribute value, bytes (linux/limits.h)."""
XATTR_LIST_MAX: Final = 65536
"""Largest list of extended attribute names, bytes (linux/limits.h)."""
SYMLINK_MAX: Final = 4095
"""Longest symbolic link target, bytes (PATH_MAX without the NUL)."""
UNIQUE_RESEND: Final = 1 << 63
"""Set in a request's unique when the request is sent again after FUSE_NOTIFY_RESEND."""


class Opcode(IntEnum):
    """fuse_in_header.opcode."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


class InitFlag(IntFlag):
    """INIT flags of both sides: `flags | flags2 << 32`."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    FILE_OPS = 1 << 2
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    SPLICE_WRITE = 1 << 7
    SPLICE_MOVE = 1 << 8
    SPLICE_READ = 1 << 9
    FLOCK_LOCKS = 1 << 10
    HAS_IOCTL_DIR = 1 << 11
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    MAP_ALIGNMENT = 1 << 26
    SUBMOUNTS = 1 << 27
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    INIT_RESERVED = 1 << 31
    SECURITY_CTX = 1 << 32
    HAS_INODE_DAX = 1 << 33
    CREATE_SUPP_GROUP = 1 << 34
    HAS_EXPIRE_ONLY = 1 << 35
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    NO_EXPORT_SUPPORT = 1 << 38
    HAS_RESEND = 1 << 39
    ALLOW_IDMAP = 1 << 40
    OVER_IO_URING = 1 << 41
    REQUEST_TIMEOUT = 1 << 42


class FattrFlag(IntFlag):
    """fuse_setattr_in.valid (FATTR_*): what a SETATTR changes."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    LOCKOWNER = 1 << 9
    CTIME = 1 << 10
    KILL_SUIDGID = 1 << 11


class OpenFlag(IntFlag):
    """fuse_open_out.open_flags (FOPEN_*)."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NONSEEKABLE = 1 << 2
    CACHE_DIR = 1 << 3
    STREAM = 1 << 4
    NOFLUSH = 1 << 5
    PARALLEL_DIRECT_WRITES = 1 << 6
    PASSTHROUGH = 1 << 7


class WriteFlag(IntFlag):
    """fuse_write_in.write_flags."""

    CACHE = 1 << 0
    LOCKOWNER = 1 << 1
    KILL_SUIDGID = 1 << 2


class ReleaseFlag(IntFlag):
    """fuse_release_in.release_flags."""

    FLUSH = 1 << 0
    FLOCK_UNLOCK = 1 << 1


class AttrFlag(IntFlag):
    """fuse_attr.flags."""

    SUBMOUNT = 1 << 0
    DAX = 1 << 1


class SetupMappingFlag(IntFlag):
    """fuse_setupmapping_in.flags."""

    WRITE = 1 << 0
    READ = 1 << 1


class ExtensionType(IntEnum):
    """fuse_ext_header.type; values up to MAX_NR_SECCTX mean that many security contexts."""

    MAX_NR_SECCTX = 31
    GROUPS = 32


class NotifyCode(IntEnum):
    """Unsolicited messages of a server (fuse_out_header.error with unique 0). virtio-fs carries none."""

    POLL = 1
    INVAL_INODE = 2
    INVAL_ENTRY = 3
    STORE = 4
    RETRIEVE = 5
    DELETE = 6
    RESEND = 7
    INC_EPOCH = 8
    PRUNE = 9


GETATTR_FH: Final = 1 << 0
"""fuse_getattr_in.getattr_flags: fh is valid."""
OPEN_KILL_SUIDGID: Final = 1 << 0
"""fuse_open_in.open_flags and fuse_create_in.open_flags: O_TRUNC clears set-user-ID and set-group-ID."""
READ_LOCKOWNER: Final = 1 << 1
"""fuse_read_in.read_flags: lock_owner is valid."""
FSYNC_FDATASYNC: Final = 1 << 0
"""fuse_fsync_in.fsync_flags: data only."""
SETXATTR_ACL_KILL_SGID: Final = 1 << 0
"""fuse_setxattr_in.setxattr_flags: setting this access ACL clears the set-group-ID bit."""
LK_FLOCK: Final = 1 << 0
"""fuse_lk_in.lk_flags: a BSD lock, not a POSIX one."""
EXPIRE_ONLY: Final = 1 << 0
"""fuse_notify_inval_entry_out.flags: expire the entry, do not drop it."""


# --- headers -------------------------------------------------------------------------------------

# len, opcode, unique, nodeid, uid, gid, pid, total_extlen (of extensions, in units of 8 bytes)
IN_HEADER: Final = Struct("<IIQQIIIHxx")
# len, error (0 or a negative errno), unique
OUT_HEADER: Final = Struct("<IiQ")
# size (this header included), type: an extension at the end of a request
EXT_HEADER: Final = Struct("<II")
# size (this header and all contexts), number of contexts
SECCTX_HEADER: Final = Struct("<II")
# size of the context; the attribute's name (NUL) and the context follow
SECCTX: Final = Struct("<I4x")
# number of groups; that many 32-bit group ids follow
SUPP_GROUPS: Final = Struct("<I")


class InHeader(NamedTuple):
    """Fields of IN_HEADER."""

    len: int
    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    total_extlen: int


# --- INIT ----------------------------------------------------------------------------------------

# the form of kernels since 7.36; flags2 counts only when InitFlag.INIT_EXT is set in flags
INIT_IN: Final = Struct("<IIIII44x")
# the form of kernels before 7.36: without flags2
INIT_IN_SHORT: Final = Struct("<IIII")
INIT_OUT: Final = Struct("<IIIIHHIIHHIIH22x")


class InitIn(NamedTuple):
    """Fields of INIT_IN; max_readahead in bytes."""

    major: int
    minor: int
    max_readahead: int
    flags: int
    flags2: int


class InitOut(NamedTuple):
    """Fields of INIT_OUT; max_readahead and max_write in bytes, time_gran in ns, request_timeout in s,
    map_alignment as log2 of bytes."""

    major: int
    minor: int
    max_readahead: int
    flags: int
    max_background: int
    congestion_threshold: int
    max_write: int
    time_gran: int
    max_pages: int
    map_alignment: int
    flags2: int
    max_stack_depth: int
    request_timeout: int


# --- inodes and names ----------------------------------------------------------------------------

ATTR: Final = Struct("<QQQqqqIIIIIIIIII")


class Attr(NamedTuple):
    """Fields of ATTR (fuse_attr); blocks in units of 512 bytes."""

    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int


# nodeid (0: a cacheable negative entry), generation, entry_valid, attr_valid (seconds),
# entry_valid_nsec, attr_valid_nsec; then ATTR
ENTRY_OUT: Final = Struct("<QQQQII")
ENTRY_OUT_SIZE: Final = ENTRY_OUT.size + ATTR.size
# attr_valid (seconds), attr_valid_nsec; then ATTR
ATTR_OUT: Final = Struct("<QI4x")
ATTR_OUT_SIZE: Final = ATTR_OUT.size + ATTR.size


class EntryOut(NamedTuple):
    """Fields of ENTRY_OUT; an ATTR follows on the wire."""

    nodeid: int
    generation: int
    entry_valid: int
    attr_valid: int
    entry_valid_nsec: int
    attr_valid_nsec: int


# nlookup
FORGET_IN: Final = Struct("<Q")
# count; that many FORGET_ONE follow
BATCH_FORGET_IN: Final = Struct("<I4x")
# nodeid, nlookup
FORGET_ONE: Final = Struct("<QQ")
# getattr_flags, fh
GETATTR_IN: Final = Struct("<I4xQ")
SETATTR_IN: Final = Struct("<I4xQQQqqqIIII4xII4x")


class SetattrIn(NamedTuple):
    """Fields of SETATTR_IN; size in bytes, times in seconds and nanoseconds."""

    valid: int
    fh: int
    size: int
    lock_owner: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    uid: int
    gid: int


# getattr_flags, fh, sx_flags, sx_mask
STATX_IN: Final = Struct("<I4xQII")
# mode, rdev, umask; the name follows
MKNOD_IN: Final = Struct("<III4x")
# mode, umask; the name follows
MKDIR_IN: Final = Struct("<II")
# newdir (nodeid); the old and the new name follow
RENAME_IN: Final = Struct("<Q")
# newdir (nodeid), flags (RENAME_*); the old and the new name follow
RENAME2_IN: Final = Struct("<QI4x")
# oldnodeid; the new name follows
LINK_IN: Final = Struct("<Q")
# mask (R_OK, W_OK, X_OK)
ACCESS_IN: Final = Struct("<I4x")

# --- open files ----------------------------------------------------------------------------------

# flags (O_*), open_flags (OPEN_KILL_SUIDGID)
OPEN_IN: Final = Struct("<II")
# flags (O_*), mode, umask, open_flags; the name follows (TMPFILE too)
CREATE_IN: Final = Struct("<IIII")
# fh, open_flags (FOPEN_*), backing_id
OPEN_OUT: Final = Struct("<QIi")
# fh, flags (O_*), release_flags, lock_owner
RELEASE_IN: Final = Struct("<QIIQ")
# fh, lock_owner
FLUSH_IN: Final = Struct("<Q8xQ")
# fh, offset, size, read_flags, lock_owner, flags (O_*); READDIR and READDIRPLUS too
READ_IN: Final = Struct("<QQIIQI4x")
# fh, offset, size, write_flags, lock_owner, flags (O_*); the data follows
WRITE_IN: Final = Struct("<QQIIQI4x")
# size: bytes written; COPY_FILE_RANGE too
WRITE_OUT: Final = Struct("<I4x")
# fh, fsync_flags
FSYNC_IN: Final = Struct("<QI4x")
# fh, offset, whence (SEEK_*)
LSEEK_IN: Final = Struct("<QqI4x")
# offset
LSEEK_OUT: Final = Struct("<q")
# fh, offset, length, mode (FALLOC_FL_*)
FALLOCATE_IN: Final = Struct("<QQQI4x")
# fh_in, off_in, nodeid_out, fh_out, off_out, len, flags
COPY_FILE_RANGE_IN: Final = Struct("<QQQQQQQ")
# bytes_copied: the reply of COPY_FILE_RANGE_64
COPY_FILE_RANGE_OUT: Final = Struct("<Q")
# fh, owner, start, end, type (F_RDLCK, F_WRLCK, F_UNLCK), pid, lk_flags
LK_IN: Final = Struct("<QQQQIII4x")
# start, end, type, pid
LK_OUT: Final = Struct("<QQII")
# unique: of the request to interrupt
INTERRUPT_IN: Final = Struct("<Q")

# --- directories ---------------------------------------------------------------------------------

# ino, off (of the next entry), namelen, type (DT_*); the name follows, padded to 8 bytes
DIRENT: Final = Struct("<QQII")
DIRENTPLUS_NAME_OFFSET: Final = ENTRY_OUT_SIZE + DIRENT.size
"""READDIRPLUS: an entry_out, a dirent and the name, padded to 8 bytes."""


def dirent_size(name_length: int) -> int:
    """Bytes that a READDIR entry with a name of that many bytes takes."""
    return (DIRENT.size + name_length + 7) & ~7


def direntplus_size(name_length: int) -> int:
    """Bytes that a READDIRPLUS entry with a name of that many bytes takes."""
    return (DIRENTPLUS_NAME_OFFSET + name_length + 7) & ~7


# --- the file system -----------------------------------------------------------------------------

KSTATFS: Final = Struct("<QQQQQIII28x")


class Kstatfs(NamedTuple):
    """Fields of KSTATFS (fuse_statfs_out); blocks, bfree and bavail in units of frsize."""

    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    bsize: int
    namelen: int
    frsize: int


# the body of SYNCFS: padding only
SYNCFS_IN: Final = Struct("<8x")

# --- extended attributes -------------------------------------------------------------------------

# size, flags (XATTR_*), setxattr_flags: with InitFlag.SETXATTR_EXT; the name and the value follow
SETXATTR_IN: Final = Struct("<III4x")
# size, flags: without it
SETXATTR_IN_SHORT: Final = Struct("<II")
# size of the guest's buffer (0: ask for the size); the name follows (not for LISTXATTR)
GETXATTR_IN: Final = Struct("<I4x")
# size: the reply to size 0
GETXATTR_OUT: Final = Struct("<I4x")

# --- DAX -----------------------------------------------------------------------------------------

# fh, foffset, len, flags, moffset
SETUPMAPPING_IN: Final = Struct("<QQQQQ")
# count; that many REMOVEMAPPING_ONE follow
REMOVEMAPPING_IN: Final = Struct("<I")
# moffset, len
REMOVEMAPPING_ONE: Final = Struct("<QQ")
