# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""Which function serves which opcode: the one place where a request finds its operation.

A compiled operation takes a request and gives 0 with the reply's body in place, an errno, NO_REPLY, or PARK. One in
Python takes the file system and a Request, and returns the reply's body; it raises OSError, whose errno becomes the
reply, or Parked. What has no operation is answered with ENOSYS.
"""

from libc.errno cimport EIO, ENOSYS, ERANGE, EROFS
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from coherent_vfs.coherence.shm.leases cimport lt_now
from coherent_vfs.server.caching.publishing cimport PARK
from coherent_vfs.server.fuse.wire cimport *
from coherent_vfs.server.operations.create cimport create
from coherent_vfs.server.operations.io cimport flush, open_directory, open_file, read, release, write
from coherent_vfs.server.operations.lookup cimport batch_forget, forget, getattr_, look_up
from coherent_vfs.server.operations.readdir cimport readdir
from coherent_vfs.server.operations.unlink cimport unlink
from coherent_vfs.server.session.file_system cimport FileSystem
from coherent_vfs.server.session.request cimport NO_REPLY, REPLY_CAPACITY, request_t, wrap

from coherent_vfs.server.caching.parking import Parked
from coherent_vfs.server.fuse.protocol import Opcode
from coherent_vfs.server.operations import attributes, dax, links, namespace, space, xattr

ctypedef int (*operation_t)(FileSystem fs, request_t *request) except -100

cdef enum:
    OPCODES = 64

cdef operation_t COMPILED[OPCODES]
COMPILED[FUSE_LOOKUP] = look_up
COMPILED[FUSE_FORGET] = forget
COMPILED[FUSE_BATCH_FORGET] = batch_forget
COMPILED[FUSE_GETATTR] = getattr_
COMPILED[FUSE_OPEN] = open_file
COMPILED[FUSE_OPENDIR] = open_directory
COMPILED[FUSE_RELEASE] = release
COMPILED[FUSE_RELEASEDIR] = release
COMPILED[FUSE_FLUSH] = flush
COMPILED[FUSE_READ] = read
COMPILED[FUSE_WRITE] = write
COMPILED[FUSE_READDIR] = readdir
COMPILED[FUSE_READDIRPLUS] = readdir
COMPILED[FUSE_CREATE] = create
COMPILED[FUSE_UNLINK] = unlink
COMPILED[FUSE_INIT] = init
COMPILED[FUSE_DESTROY] = destroy
COMPILED[FUSE_INTERRUPT] = interrupt

PYTHON = {
    Opcode.SETATTR: attributes.setattr_,
    Opcode.ACCESS: attributes.access,
    Opcode.STATFS: attributes.statfs,
    Opcode.FSYNC: space.fsync,
    Opcode.FSYNCDIR: space.fsyncdir,
    Opcode.SYNCFS: space.syncfs,
    Opcode.LSEEK: space.lseek,
    Opcode.FALLOCATE: space.fallocate,
    Opcode.COPY_FILE_RANGE: space.copy_file_range,
    Opcode.COPY_FILE_RANGE_64: space.copy_file_range_64,
    Opcode.MKNOD: namespace.mknod,
    Opcode.MKDIR: namespace.mkdir,
    Opcode.TMPFILE: namespace.tmpfile,
    Opcode.RMDIR: namespace.rmdir,
    Opcode.RENAME: namespace.rename,
    Opcode.RENAME2: namespace.rename2,
    Opcode.LINK: links.link,
    Opcode.SYMLINK: links.symlink,
    Opcode.READLINK: links.readlink,
    Opcode.SETXATTR: xattr.setxattr,
    Opcode.GETXATTR: xattr.getxattr,
    Opcode.LISTXATTR: xattr.listxattr,
    Opcode.REMOVEXATTR: xattr.removexattr,
    Opcode.SETUPMAPPING: dax.setup_mapping,
    Opcode.REMOVEMAPPING: dax.remove_mapping,
}

CHANGES = {
    Opcode.SETATTR, Opcode.FALLOCATE, Opcode.COPY_FILE_RANGE, Opcode.COPY_FILE_RANGE_64, Opcode.MKNOD, Opcode.MKDIR,
    Opcode.TMPFILE, Opcode.RMDIR, Opcode.RENAME, Opcode.RENAME2, Opcode.LINK, Opcode.SYMLINK,
}
"""Of the operations in Python those that a share that is read-only answers with EROFS."""


cdef bint is_compiled(unsigned opcode) noexcept:
    """Whether an operation is compiled, and so done in microseconds."""
    return opcode < OPCODES and COMPILED[opcode] != NULL


cdef int serve(FileSystem fs, request_t *request) except -100:
    """Serve a request: 0, an errno, NO_REPLY, or PARK."""
    cdef uint32_t opcode = request.header.opcode
    if opcode < OPCODES:
        fs.counters[opcode] += 1
    fs.inodes.begin_request()
    fs.validity.begin_request()
    if not fs.initialized and opcode != FUSE_INIT:
        return NO_REPLY if opcode in (FUSE_FORGET, FUSE_BATCH_FORGET, FUSE_INTERRUPT) else EIO
    if is_compiled(opcode):
        return COMPILED[opcode](fs, request)
    return serve_in_python(fs, request)


cdef int serve_in_python(FileSystem fs, request_t *request) except -100:
    cdef bytes reply
    operation = PYTHON.get(request.header.opcode)
    if operation is None:
        return ENOSYS
    if fs.readonly and request.header.opcode in CHANGES:
        return EROFS
    try:
        reply = operation(fs, wrap(request))
    except OSError as error:
        return error.errno or EIO
    except Parked as parked:
        if parked.args:
            return fs.publisher.put_off(lt_now() + <uint64_t>(1_000_000 * parked.args[0]))
        return PARK
    if <size_t>len(reply) > min(<size_t>REPLY_CAPACITY, request.reply_capacity):
        return ERANGE
    memcpy(request.reply, <char *>reply, len(reply))
    request.reply_size = len(reply)
    return 0


cdef int init(FileSystem fs, request_t *request) except -100:
    cdef bytes reply
    try:
        reply = fs.initialize(request.body[:request.body_size])
    except OSError as error:
        return error.errno
    # Guests before 7.23 take a shorter reply.
    request.reply_size = min(<size_t>len(reply), request.reply_capacity)
    memcpy(request.reply, <char *>reply, request.reply_size)
    return 0


cdef int destroy(FileSystem fs, request_t *request) except -100:
    return fs.end(request.header.unique)


cdef int interrupt(FileSystem fs, request_t *request) except -100:
    # Requests are served one after the other: unless it is parked, what it means is over already.
    if request.body_size >= sizeof(fuse_interrupt_in):
        fs.interrupt((<fuse_interrupt_in *>request.body).unique)
    return NO_REPLY
