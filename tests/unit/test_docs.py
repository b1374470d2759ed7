"""The documents: links lead somewhere, generated parts are up to date, nothing that a user may see is left out."""

from __future__ import annotations

import importlib.util
import re
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).parents[2]
PAGES = sorted([*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/**/*.md"), *CHECKOUT.glob("tests/*/README.md")])
REFERENCE = CHECKOUT / "docs/reference"
SOURCES = [path for top in ("coherence", "server") for path in (CHECKOUT / top).rglob("*.py*") if path.suffix != ".pyc"]
STRING = r'f?"((?:[^"\\]|\\.)*)"'


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py."""
    spec = importlib.util.spec_from_file_location("generate", CHECKOUT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as mkdocs and code forges make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short() -> None:
    assert len((CHECKOUT / "README.md").read_text().splitlines()) <= 150


def test_generated_parts_are_up_to_date(generate: ModuleType) -> None:
    old = [str(path) for path, text in generate.pages().items() if path.read_text() != text]
    assert not old, "run: .venv/bin/python docs/generate.py"


def test_each_option_is_in_the_reference(generate: ModuleType) -> None:
    for name, parser in generate.parsers().items():
        told = (REFERENCE / f"{name}.md").read_text()
        for each in (parser, *generate.subcommands(parser).values()):
            options = set(chain.from_iterable(action.option_strings for action in each._actions))
            missing = [option for option in options - {"-h", "--help"} if f"`{option}" not in told]
            assert not missing, name


def test_each_setting_and_metric_is_in_the_reference() -> None:
    settings = re.findall(r"^# ?([a-z-]+) = |^([a-z-]+) = ", (CHECKOUT / "packaging/coherenced.toml").read_text(), re.M)
    told = (REFERENCE / "configuration.md").read_text()
    assert [name for name in map("".join, settings) if f"| `{name}` |" not in told] == []
    families = next(path for path in SOURCES if path.name == "families.py").read_text()
    told = (REFERENCE / "metrics.md").read_text()
    names = re.findall(r'\("(?:coherenced_backend_)?([a-z_]+)", "[A-Z1]', families)
    assert len(names) > 20
    named = r"`coherenced_(backend_)?{}(_total)?(\{{[a-z]+\}})?`"
    assert [name for name in names if not re.search(named.format(name), told)] == []


def test_each_error_and_warning_is_in_troubleshooting() -> None:
    told = (CHECKOUT / "docs/operations/troubleshooting.md").read_text()
    call = rf"(?:UserError|log\.(?:warning|error)|\)\.(?:warning|error))\(\s*((?:{STRING}\s*)+)"
    found, missing = 0, []
    for source in SOURCES:
        for match in re.finditer(call, source.read_text()):
            text = "".join(re.findall(STRING, match[1]))
            parts = [part.strip() for part in re.split(r"\{[^{}]*\}", text) if len(part.strip()) > 3]
            found += 1
            if not all(part in told for part in parts):
                missing.append(f"{source.relative_to(CHECKOUT)}: {text}")
    assert not missing
    assert found > 80
