"""Programs for guests are built once for each content of their sources."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.lab import assets
from tests.lab.paths import LabError

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler: apt-get install gcc libc6-dev")


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(assets, "BUILT", tmp_path / "built")


def test_files_of_a_folder_are_one_program(tmp_path: Path) -> None:
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "answer.h").write_text("int answer(void);\n#define MORE 1\n")
    (folder / "answer.c").write_text('#include "answer.h"\nint answer(void) { return 41 + MORE; }\n')
    (folder / "main.c").write_text('#include "answer.h"\nint main(void) { return answer(); }\n')
    first = assets.compile_static(folder)
    assert subprocess.run([first], check=False).returncode == 42
    assert assets.compile_static(folder) == first
    (folder / "answer.h").write_text("int answer(void);\n#define MORE 2\n")
    second = assets.compile_static(folder)
    assert subprocess.run([second], check=False).returncode == 43


def test_program_that_does_not_compile_is_told(tmp_path: Path) -> None:
    source = tmp_path / "wrong.c"
    source.write_text("int main(void) { return nothing; }\n")
    with pytest.raises(LabError, match=r"(?s)wrong\.c does not compile:.*nothing"):
        assets.compile_static(source)
