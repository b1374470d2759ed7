"""System calls of the compiled operations, as libc has them or, where it lacks one, by number."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from posix.types cimport mode_t, off_t
from posix.uio cimport iovec

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <dirent.h>
    #include <fcntl.h>
    #include <linux/fs.h>
    #include <linux/openat2.h>
    #include <stdio.h>
    #include <string.h>
    #include <sys/ioctl.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/sysmacros.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>

    /* Of every file that a guest gets to know. */
    #define STATX_WANTED (STATX_BASIC_STATS | STATX_MNT_ID)

    /* One component of a directory that is held open: no link is followed, nothing outside is reached. */
    static inline int open_beneath(int dir_fd, const char *name, int flags, mode_t mode)
    {
        struct open_how how = {
            .flags = (unsigned)flags | O_NOFOLLOW | O_CLOEXEC,
            .mode = flags & O_CREAT ? mode : 0,
            .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS,
        };
        return (int)syscall(SYS_openat2, dir_fd, name, &how, sizeof how);
    }

    static inline uint64_t statx_dev(const struct statx *stx)
    {
        return makedev(stx->stx_dev_major, stx->stx_dev_minor);
    }

    /* Whether a file has the flag that chattr(1) calls x. */
    static inline int has_dax_flag(int fd)
    {
        struct fsxattr attributes;
        return ioctl(fd, FS_IOC_FSGETXATTR, &attributes) == 0 && attributes.fsx_xflags & FS_XFLAG_DAX;
    }

    static inline int64_t realtime_ns(void)
    {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    }

    static inline uint64_t monotonic_ns(void)
    {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    }
    """
    enum:
        AT_EACCESS
        AT_EMPTY_PATH
        AT_STATX_DONT_SYNC
        AT_SYMLINK_NOFOLLOW
        O_PATH
        O_NOFOLLOW
        O_CLOEXEC
        O_DIRECTORY
        O_DIRECT
        STATX_BASIC_STATS
        STATX_MNT_ID
        STATX_NLINK
        STATX_WANTED
        S_IFMT
        S_IFREG
        S_IFDIR
        S_IFLNK
        DT_REG
        RWF_DSYNC
        RWF_SYNC
        MAX_HANDLE_SZ

    struct statx_timestamp:
        int64_t tv_sec
        uint32_t tv_nsec

    struct statx_t "statx":
        uint32_t stx_blksize
        uint32_t stx_nlink
        uint32_t stx_uid
        uint32_t stx_gid
        uint16_t stx_mode
        uint64_t stx_ino
        uint64_t stx_size
        uint64_t stx_blocks
        statx_timestamp stx_atime
        statx_timestamp stx_ctime
        statx_timestamp stx_mtime
        uint32_t stx_rdev_major
        uint32_t stx_rdev_minor
        uint64_t stx_mnt_id

    struct dirent64:
        uint64_t d_ino
        int64_t d_off
        uint16_t d_reclen
        unsigned char d_type
        char d_name[256]

    struct file_handle:
        unsigned handle_bytes
        int handle_type
        unsigned char *f_handle

    int name_to_handle_at(int dir_fd, const char *path, file_handle *handle, int *mount_id, int flags) noexcept nogil
    int open_by_handle_at(int mount_fd, file_handle *handle, int flags) noexcept nogil
    int statx(int dir_fd, const char *path, int flags, unsigned mask, statx_t *stx) noexcept nogil
    int open_beneath(int dir_fd, const char *name, int flags, mode_t mode) noexcept nogil
    int faccessat(int dir_fd, const char *path, int mode, int flags) noexcept nogil
    int openat(int dir_fd, const char *path, int flags, ...) noexcept nogil
    int unlinkat(int dir_fd, const char *path, int flags) noexcept nogil
    ssize_t getdents64(int fd, void *buffer, size_t size) noexcept nogil
    ssize_t preadv(int fd, const iovec *iov, int count, off_t offset) noexcept nogil
    ssize_t pwritev2(int fd, const iovec *iov, int count, off_t offset, int flags) noexcept nogil
    uint64_t statx_dev(const statx_t *stx) noexcept nogil
    bint has_dax_flag(int fd)
    int64_t realtime_ns() noexcept nogil
    uint64_t monotonic_ns() noexcept nogil
    size_t strnlen(const char *text, size_t size) noexcept nogil
    int snprintf(char *text, size_t size, const char *format, ...) noexcept nogil
