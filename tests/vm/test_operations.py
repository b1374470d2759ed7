"""Every file operation in a real guest, by system calls and by shell tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab import assets, backends
from tests.lab.guest import boot

PROGRAM = Path(__file__).with_name("programs") / "operations"

# What a mode cannot do: without a page cache there are no shared mappings (but with --allow-mmap).
# With delayed writes the guest finds no holes.
SKIPPED = {"none": {"mapped"}, "auto": set[str](), "always": set[str](), "always --writeback": {"holes"}}


@pytest.mark.parametrize(
    ("kind", "cache"),
    [
        ("qemu", "none"),
        pytest.param("qemu", "auto", marks=pytest.mark.slow),
        pytest.param("qemu", "always", marks=pytest.mark.slow),
        ("uml", "none"),
        ("uml", "auto"),
        ("uml", "always"),
        ("uml", "always --writeback"),
    ],
    indirect=["kind"],
)
def test_system_calls(kind: str, cache: str, share: Path, run_dir: Path) -> None:
    mode, *options = cache.split()
    with (
        backends.ours(share, run_dir, cache=mode, options=["--xattr", *options]) as backend,
        boot(kind, shares={"share": backend.socket}) as vm,
    ):
        vm.mount("share", "/mnt")
        vm.put_file("/operations", assets.compile_static(PROGRAM).read_bytes())
        result = vm.run("/operations /mnt", timeout=100)
        lines = result.output.decode().splitlines()
        skipped = {line.split()[1].rstrip(":") for line in lines if line.startswith("skip ")}
        assert [line for line in lines if line.startswith("FAIL")] == []
        assert result.status == 0
        assert skipped == SKIPPED[cache]
        assert len(lines) > 30
        assert backend.process.output() == ""


@pytest.mark.parametrize("kind", ["uml"], indirect=True)
def test_shared_mapping_without_a_cache_where_it_is_allowed(kind: str, share: Path, run_dir: Path) -> None:
    with (
        backends.ours(share, run_dir, cache="none", options=["--allow-mmap"]) as backend,
        boot(kind, shares={"share": backend.socket}) as vm,
    ):
        vm.mount("share", "/mnt")
        vm.put_file("/operations", assets.compile_static(PROGRAM).read_bytes())
        assert vm.check("/operations /mnt mapped") == b"ok mapped\n"
        assert (share / "mapped/f").read_bytes()[4096:4112] == b"through the map\0"


# Busybox stands for the shell tools; each line must succeed in the mounted directory.
SHELL = r"""
set -eux
mkdir -p tree/a/b/c
echo one > tree/a/one; echo two > tree/a/b/two; seq 1 5000 > tree/numbers
cp -a tree copy; diff -r tree copy
mv copy moved; test ! -e copy; test -d moved/a/b/c
ln tree/numbers hard; ln -s tree/numbers soft; test "$(readlink soft)" = tree/numbers
test "$(wc -l < soft)" -eq 5000; test "$(stat -c %h hard)" -eq 2
sed -i 's/^1000$/thousand/' tree/numbers; grep -q thousand tree/numbers; ! grep -q thousand hard
tar cf all.tar tree; mkdir out; tar xf all.tar -C out; diff -r tree out/tree
chmod 640 hard; test "$(stat -c %a hard)" = 640
chown 1000:1000 hard; test "$(stat -c %u:%g hard)" = 1000:1000
touch -d '2001-02-03 04:05:06' hard; test "$(stat -c %Y hard)" -eq "$(date -d '2001-02-03 04:05:06' +%s)"
truncate -s 100 hard; test "$(stat -c %s hard)" -eq 100
dd if=/dev/zero of=zeros bs=64k count=32 conv=fsync 2>/dev/null; test "$(stat -c %s zeros)" -eq 2097152
test "$(find tree -type f | wc -l)" -eq 3
mkfifo pipe; (echo through > pipe &); test "$(cat pipe)" = through
df . > /dev/null; df -i . > /dev/null; du -s . > /dev/null; sync
for i in $(seq 1 300); do echo $i > many.$i; done; test "$(ls many.* | wc -l)" -eq 300; rm many.*
rm -rf tree moved out; rm hard soft all.tar zeros pipe
test -z "$(ls -A .)"
"""


@pytest.mark.parametrize("kind", ["qemu"], indirect=True)
@pytest.mark.parametrize("cache", [pytest.param("none", marks=pytest.mark.slow), "auto"])
def test_shell_tools(kind: str, cache: str, share: Path, run_dir: Path) -> None:
    with (
        backends.ours(share, run_dir, cache=cache) as backend,
        boot(kind, shares={"share": backend.socket}) as vm,
    ):
        vm.mount("share", "/mnt")
        vm.check(f"cd /mnt\n{SHELL}", timeout=90)
        assert list(share.iterdir()) == []
        vm.check("umount /mnt")
        assert backend.process.output() == ""
