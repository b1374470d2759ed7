from collections.abc import Callable

from coherent_vfs.server.session.file_system import FileSystem
from coherent_vfs.server.session.request import Request

PYTHON: dict[int, Callable[[FileSystem, Request], bytes]]
CHANGES: set[int]
