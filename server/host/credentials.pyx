# cython: language_level=3
# distutils: extra_compile_args = -O3 -std=gnu11
"""Acting for a guest's user: file system uid and gid while something is created, and CAP_FSETID when it must go.

The guest's kernel has checked permissions before it asks, so the other capabilities are kept throughout
(SECBIT_NO_SETUID_FIXUP): a directory that lets the user in by a supplementary group must not stop us.
"""

from libc.errno cimport EINVAL, EPERM
from libc.stdint cimport uint32_t
from posix.unistd cimport getegid, geteuid

import contextlib
import os

cdef extern from *:
    """
    #include <linux/capability.h>
    #include <linux/securebits.h>
    #include <sys/fsuid.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    static int keep_capabilities(void)
    {
        return prctl(PR_SET_SECUREBITS, prctl(PR_GET_SECUREBITS) | SECBIT_NO_SETUID_FIXUP);
    }

    /* Switch CAP_FSETID in the effective set of this thread; it must be permitted to come back. */
    static void set_fsetid(int wanted)
    {
        struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
        struct __user_cap_data_struct data[2];
        if (syscall(SYS_capget, &header, data) < 0)
            return;
        if (wanted)
            data[0].effective |= data[0].permitted & (1u << CAP_FSETID);
        else
            data[0].effective &= ~(1u << CAP_FSETID);
        syscall(SYS_capset, &header, data);
    }
    """
    int keep_capabilities() noexcept
    void set_fsetid(int wanted) noexcept
    int setfsuid(uint32_t uid) noexcept
    int setfsgid(uint32_t gid) noexcept

cdef enum:
    NO_ID = 0xFFFFFFFF

cdef uint32_t own_uid = geteuid()
cdef uint32_t own_gid = getegid()


def prepare() -> None:
    """Once per process, before anything is served: no umask of our own, and capabilities that outlast setfsuid()."""
    os.umask(0)
    # Without CAP_SETPCAP this fails; then there are no other users to act for either.
    keep_capabilities()


cdef int become(uint32_t uid, uint32_t gid) noexcept:
    """Create as this user from here on: 0 or an errno. Whoever is not root can act for himself only."""
    if own_uid != 0:
        return 0 if uid in (0, own_uid) else EPERM
    if gid != own_gid:
        setfsgid(gid)
    if uid != own_uid:
        setfsuid(uid)
    # These calls do not say whether they failed, as for an id that our user namespace does not map: what that user
    # makes must not become root's. NO_ID changes nothing and tells what is in force.
    if (gid != own_gid and <uint32_t>setfsgid(NO_ID) != gid) or (uid != own_uid and <uint32_t>setfsuid(NO_ID) != uid):
        come_back()
        return EINVAL
    return 0


cdef void come_back() noexcept:
    """End what become() began."""
    if own_uid == 0:
        setfsuid(own_uid)
        setfsgid(own_gid)


cdef void drop_fsetid() noexcept:
    """From here on a change clears set-user-id and set-group-id bits, as for an ordinary user (capabilities(7))."""
    set_fsetid(0)


cdef void restore_fsetid() noexcept:
    """End what drop_fsetid() began."""
    set_fsetid(1)


@contextlib.contextmanager
def acting_for(uid: int, gid: int):
    """Create as this user within the block; OSError where this process may not, or there is no such user."""
    cdef int error = become(uid, gid)
    if error:
        raise OSError(error, os.strerror(error))
    try:
        yield
    finally:
        come_back()


@contextlib.contextmanager
def without_fsetid():
    """Let changes within the block clear set-user-id and set-group-id bits."""
    drop_fsetid()
    try:
        yield
    finally:
        restore_fsetid()
