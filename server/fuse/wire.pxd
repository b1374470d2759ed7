"""FUSE wire structures for the compiled operations, straight from the kernel's header (include/uapi/linux/fuse.h)."""

from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t

cdef extern from "<linux/fuse.h>" nogil:
    cdef enum:
        FUSE_ROOT_ID
        FUSE_LOOKUP
        FUSE_FORGET
        FUSE_GETATTR
        FUSE_UNLINK
        FUSE_OPEN
        FUSE_READ
        FUSE_WRITE
        FUSE_RELEASE
        FUSE_FLUSH
        FUSE_INIT
        FUSE_OPENDIR
        FUSE_READDIR
        FUSE_RELEASEDIR
        FUSE_CREATE
        FUSE_INTERRUPT
        FUSE_DESTROY
        FUSE_BATCH_FORGET
        FUSE_READDIRPLUS
        FUSE_WRITE_CACHE
        FUSE_WRITE_KILL_SUIDGID
        FUSE_OPEN_KILL_SUIDGID

    struct fuse_in_header:
        uint32_t len
        uint32_t opcode
        uint64_t unique
        uint64_t nodeid
        uint32_t uid
        uint32_t gid
        uint32_t pid

    struct fuse_out_header:
        uint32_t len
        int32_t error
        uint64_t unique

    struct fuse_attr:
        uint64_t ino
        uint64_t size
        uint64_t blocks
        uint64_t atime
        uint64_t mtime
        uint64_t ctime
        uint32_t atimensec
        uint32_t mtimensec
        uint32_t ctimensec
        uint32_t mode
        uint32_t nlink
        uint32_t uid
        uint32_t gid
        uint32_t rdev
        uint32_t blksize
        uint32_t flags

    struct fuse_entry_out:
        uint64_t nodeid
        uint64_t generation
        uint64_t entry_valid
        uint64_t attr_valid
        uint32_t entry_valid_nsec
        uint32_t attr_valid_nsec
        fuse_attr attr

    struct fuse_attr_out:
        uint64_t attr_valid
        uint32_t attr_valid_nsec
        fuse_attr attr

    struct fuse_interrupt_in:
        uint64_t unique
    struct fuse_forget_in:
        uint64_t nlookup

    struct fuse_forget_one:
        uint64_t nodeid
        uint64_t nlookup

    struct fuse_batch_forget_in:
        uint32_t count

    struct fuse_open_in:
        uint32_t flags
        uint32_t open_flags

    struct fuse_create_in:
        uint32_t flags
        uint32_t mode
        uint32_t umask
        uint32_t open_flags

    struct fuse_open_out:
        uint64_t fh
        uint32_t open_flags

    struct fuse_release_in:
        uint64_t fh

    struct fuse_flush_in:
        uint64_t fh

    struct fuse_read_in:
        uint64_t fh
        uint64_t offset
        uint32_t size
        uint32_t flags

    struct fuse_write_in:
        uint64_t fh
        uint64_t offset
        uint32_t size
        uint32_t write_flags
        uint32_t flags

    struct fuse_write_out:
        uint32_t size

    struct fuse_dirent:
        uint64_t ino
        uint64_t off
        uint32_t namelen
        uint32_t type

    struct fuse_direntplus:
        fuse_entry_out entry_out
        fuse_dirent dirent
