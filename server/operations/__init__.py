"""The operations that a guest needs seldom, each written once in plain Python.

The compiled core (server/session/file_system.pyx) serves the frequent ones itself and calls OPERATIONS for the
rest. An operation takes the file system and the request, and returns the reply's body or raises OSError,
whose errno becomes the reply. What is not in OPERATIONS either is answered with ENOSYS.
"""

from coherent_vfs.server.operations import attributes, dax, links, namespace, space, xattr
from coherent_vfs.server.operations.interface import OPERATIONS

__all__ = ["OPERATIONS", "attributes", "dax", "links", "namespace", "space", "xattr"]
