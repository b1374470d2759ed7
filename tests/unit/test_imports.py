"""Imports go one way: from the top of each list here down, in Python and in Cython."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYERS = {
    "coherence": [
        *("ctl", "daemon", "daemon.watch", "daemon.dax", "daemon.metrics", "client", "protocol", "shm", "common"),
    ],
    "server": [
        *("", "device", "operations", "session", "settings", "dax", "caching", "passthrough", "vhost_user", "virtio"),
        *("fuse", "host"),
    ],
    "guest": [""],
}
"""The folders of each package, the highest first; "" are the modules at its top."""
DOORS = {
    "server": ["coherence.client", "coherence.protocol", "coherence.shm", "coherence.common"],
    "guest": [
        *("coherence.protocol", "coherence.shm", "coherence.common"),
        *("server.vhost_user", "server.virtio", "server.fuse", "server.host"),
    ],
}
"""What a package may use of the others."""

STATEMENT = re.compile(
    r"^\s*from coherent_vfs\.([\w.]+) c?import (\([^)]*\)|.*)|^\s*c?import coherent_vfs\.([\w.]+)", re.MULTILINE
)


def layer(module: str) -> str:
    """The package and folder of a module, by the longest name that LAYERS has: coherence.daemon.dax, server."""
    package, *rest = module.split(".")
    folders = [folder for n in (2, 1) if (folder := ".".join(rest[:n])) in LAYERS[package]]
    return f"{package}.{folders[0]}" if folders else package


def imports(source: str) -> Iterator[str]:
    """The names that are imported, each with its module."""
    for module, names, alone in STATEMENT.findall(source):
        if alone:
            yield alone
        for name in filter(None, map(str.strip, names.strip("()").split(","))):
            yield f"{module}.{name.split(' as ')[0]}"


def allowed(importer: str, imported: str) -> bool:
    """Whether one layer may import another."""
    package, _, folder = importer.partition(".")
    other, _, its_folder = imported.partition(".")
    if package != other:
        return imported in DOORS.get(package, [])
    return LAYERS[package].index(folder) <= LAYERS[package].index(its_folder)


@pytest.mark.parametrize("package", LAYERS)
def test_imports_go_down_only(package: str) -> None:
    sources = [path for suffix in ("py", "pyx", "pxd") for path in (ROOT / package).rglob(f"*.{suffix}")]
    assert len(sources) > 10
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources
        for name in imports(path.read_text())
        if not allowed(layer(".".join(path.relative_to(ROOT).with_suffix("").parts)), layer(name))
    ]
    assert not wrong


def test_a_wrong_import_is_found() -> None:
    assert not allowed("server.host", "server.session")
    assert not allowed("coherence.daemon", "coherence.ctl")
    assert not allowed("server.dax", "coherence.daemon.dax")
    assert list(imports("from coherent_vfs.server.dax import (\n    view,\n    window as w,\n)\n")) == [
        *("server.dax.view", "server.dax.window"),
    ]
