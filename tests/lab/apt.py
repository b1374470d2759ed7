"""Debian packages of any suite, fetched with the machine's own apt but without touching its state.

Each suite has a private root (sources, lists, cache) under $LAB_DIR/apt. The mirror, proxies and
credentials are those that the machine's apt is configured with. apt checks signatures and hashes, and
continues a download that was cut off; a tree is unpacked beside its place and renamed when it is whole.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from tests.lab.paths import APT_DIR, TREES, LabError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MAIN_SUITES = {"bookworm", "trixie", "forky", "sid", "oldstable", "stable", "testing", "unstable"}

Say = Callable[[str], None]


def mirror() -> str:
    """Address of the Debian archive that this machine's apt uses (deb822 or one-line sources alike)."""
    targets = subprocess.run(
        [
            "apt-get",
            "indextargets",
            "--no-release-info",
            "--format",
            "$(SITE) $(RELEASE) $(COMPONENT)",
            "Created-By: Packages",
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for line in targets.splitlines():
        site, release, component = line.split()
        if component == "main" and release in MAIN_SUITES:
            return site
    raise LabError("apt has no Debian archive: add the main component of your release to /etc/apt/sources.list")


class Suite:
    """The packages of one Debian suite.

    Args:
        name: The suite, as "trixie"; "trixie-backports" has what it lacks from trixie.
        say: Receives one line for each step that may take long.
    """

    def __init__(self, name: str, say: Say) -> None:
        self.name = name
        self._say = say
        self._root = APT_DIR / name
        self._updated = False

    def download(self, packages: Sequence[str]) -> list[Path]:
        """Download just these packages; return the .deb files."""
        self._update()
        return self._fetch(["download", *packages], self._root / "debs")

    def download_with_dependencies(self, packages: Sequence[str]) -> list[Path]:
        """Download these packages and all that they depend on; return the .deb files."""
        self._update()
        command = ["install", "--yes", "--no-install-recommends", "--download-only", *packages]
        return self._fetch(["--target-release", self.name, *command], self._root / "cache/archives")

    def dependency(self, package: str, prefix: str) -> str:
        """Name of the first dependency of a package that starts with prefix (a metapackage's real one)."""
        self._update()
        for line in self._run("apt-cache", ["depends", package]).splitlines():
            relation, _, name = line.strip().partition(": ")
            if relation == "Depends" and name.startswith(prefix):
                return name
        raise LabError(f"{package} of {self.name} depends on nothing named {prefix}*")

    def _update(self) -> None:
        if self._updated:
            return
        for folder in ("debs", "state/lists/partial", "cache/archives/partial", "nothing/partial"):
            (self._root / folder).mkdir(parents=True, exist_ok=True)
        (self._root / "status").touch()
        suites = dict.fromkeys([self.name.removesuffix("-backports"), self.name])
        sources = [f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n" for suite in suites]
        (self._root / "sources.list").write_text("".join(sources))
        self._say(f"reading the package index of Debian {self.name}")
        self._run("apt-get", ["update"])
        self._updated = True

    def _fetch(self, command: list[str], folder: Path) -> list[Path]:
        # Asked away from what is there already: apt tells only of what it would download.
        nothing = {"Dir::Cache::archives": self._root / "nothing"}
        uris = self._run("apt-get", ["--print-uris", *command], options=nothing)
        files = [line.split() for line in uris.splitlines() if line.startswith("'")]
        missing = [int(size) for _, name, size, *_ in files if not (folder / name).exists()]
        if missing:
            self._say(f"downloading {len(missing)} packages of {self.name}, {sum(missing) / 1e6:.0f} MB")
        self._run("apt-get", command, folder=folder)
        return [folder / name for _, name, *_ in files]

    def _run(
        self,
        program: str,
        arguments: Iterable[str],
        *,
        folder: Path | None = None,
        options: Mapping[str, object] | None = None,
    ) -> str:
        settings = {
            "Dir::Etc::sourcelist": self._root / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State": self._root / "state",
            "Dir::State::status": self._root / "status",
            "Dir::Cache": self._root / "cache",
            "APT::Architecture": "amd64",
            "APT::Keep-Downloaded-Packages": "true",
            "APT::Sandbox::User": "",
            "APT::Update::Error-Mode": "any",
            "Acquire::Retries": 3,
            # A mirror may be a snapshot; the signatures are checked all the same.
            "Acquire::Check-Valid-Until": "false",
            **(options or {}),
        }
        words = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        result = subprocess.run(
            [program, "-q", *words, *arguments],
            cwd=folder or self._root,
            env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise LabError(f"{program} for Debian {self.name} failed: {_reason(result.stderr)}")
        return result.stdout


def _reason(stderr: str) -> str:
    errors = [line for line in stderr.splitlines() if line.startswith("E:")]
    return (errors or stderr.strip().splitlines() or ["it said nothing"])[-1]


def unpack(name: str, key: str, debs: Callable[[], Iterable[Path]], finish: Callable[[Path], None], say: Say) -> Path:
    """Unpack packages into $LAB_DIR/trees/NAME, unless it is there already for the same key.

    Args:
        name: Name of the tree.
        key: What the tree was made from; another key makes it anew.
        debs: Called to get the .deb files when the tree has to be made.
        finish: Called with the unpacked tree, to complete it before it takes its place.
        say: Receives progress lines.
    """
    tree = TREES / name
    made_from = TREES / f"{name}.made-from"
    if tree.is_dir() and made_from.exists() and made_from.read_text() == key:
        return tree
    partial = TREES / f"{name}.partial"
    for old in (partial, tree):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    packages = list(debs())
    say(f"unpacking {len(packages)} packages into {tree}")
    for deb in packages:
        result = subprocess.run(["dpkg-deb", "-x", deb, partial], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            deb.unlink(missing_ok=True)
            raise LabError(f"{deb.name} is damaged and was removed: run the set-up again ({_reason(result.stderr)})")
    finish(partial)
    partial.rename(tree)
    made_from.write_text(key)
    return tree


def is_debian() -> bool:
    """Whether packages can be fetched here at all: an x86-64 machine with apt and the Debian keyring."""
    return platform.machine() == "x86_64" and shutil.which("apt-get") is not None and KEYRING.exists()
