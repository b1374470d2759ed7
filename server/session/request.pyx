# cython: language_level=3
# distutils: extra_compile_args = -O3 -std=gnu11
"""A FUSE request as the operations in Python get it; request.pxd has it as the compiled ones do."""


cdef class Request:
    """A request.

    Attributes:
        opcode, nodeid, unique, uid, gid, pid: as in fuse_in_header.
        body: what follows fuse_in_header.
        reply_size: bytes that the guest gave for the reply's body.
    """


cdef Request wrap(const request_t *request):
    cdef Request wrapped = Request.__new__(Request)
    wrapped.opcode = request.header.opcode
    wrapped.nodeid = request.header.nodeid
    wrapped.unique = request.header.unique
    wrapped.uid = request.header.uid
    wrapped.gid = request.header.gid
    wrapped.pid = request.header.pid
    wrapped.body = request.body[:request.body_size]
    wrapped.reply_size = request.reply_capacity
    return wrapped
