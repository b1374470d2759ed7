"""What the commands' own parsers say: option tables in docs/reference, man pages and shell completion in build/.

python docs/commands.py              the tables; tests/unit/test_docs.py fails where they are not up to date
python docs/commands.py build        also build/man and build/completion (needs the dependencies "docs")
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

import msgspec

from coherent_vfs.coherence.ctl.main import _parser as coherencectl
from coherent_vfs.coherence.daemon.main import _parser as coherenced
from coherent_vfs.coherence.protocol import messages
from coherent_vfs.server.options import _parser as vfs_backend

CHECKOUT = Path(__file__).parents[1]
REFERENCE = CHECKOUT / "docs/reference"
BEGIN, END = "<!-- generated: begin -->\n", "<!-- generated: end -->\n"


def parsers() -> Mapping[str, argparse.ArgumentParser]:
    """Of each command, by its name."""
    return {parser.prog: parser for parser in (vfs_backend(), coherenced(), coherencectl())}


def subcommands(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """Of a command that has some, by their names."""
    return {
        name: each
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, each in action.choices.items()
    }


def pages() -> Mapping[Path, str]:
    """The pages of the reference that have a generated part, as they are to be."""
    generated = {name: "\n".join(_tables(parser)) for name, parser in parsers().items()}
    generated["control-protocol"] = "\n".join(_messages())
    return {path: _with(path, text) for name, text in generated.items() if (path := REFERENCE / f"{name}.md")}


def _with(path: Path, text: str) -> str:
    head, _, rest = path.read_text().partition(BEGIN)
    return head + BEGIN + text + END + rest.partition(END)[2]


def _tables(parser: argparse.ArgumentParser) -> Iterator[str]:
    sections: dict[str, list[argparse.Action]] = {}
    for group in parser._action_groups:
        title = "" if group.title in ("positional arguments", "options") else f"**{group.title}**\n\n"
        sections.setdefault(title, []).extend(group._group_actions)
    for title, actions in sections.items():
        rows = [
            _row(parser, action)
            for action in actions
            if not isinstance(action, argparse._SubParsersAction | argparse._HelpAction)
        ]
        if rows:
            yield f"{title}| option | meaning |\n| --- | --- |\n{''.join(rows)}"
    for name, each in subcommands(parser).items():
        yield f"### {parser.prog} {name}\n\n{each.description}\n"
        yield from _tables(each)


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    value = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else "")
    name = ", ".join(action.option_strings)
    told = parser._get_formatter()._expand_help(action)
    cells = f"{name} {value}".strip() if action.nargs != 0 else name, told
    return "| `{}` | {} |\n".format(*(cell.replace("|", "\\|") for cell in cells))


def _messages() -> Iterator[str]:
    to_backend, to_client = set(get_args(messages.ToBackend)), set(get_args(messages.FromDaemon))
    from_backend, from_client = set(get_args(messages.FromBackend)), set(get_args(messages.FromClient))
    for title, kinds in (
        ("From any client", {messages.Hello}),
        ("To any client", {messages.Welcome, messages.Refused}),
        ("From a backend", from_backend),
        ("To a backend", to_backend),
        ("From a control client", from_client - from_backend - {messages.Hello}),
        ("To a control client", to_client - to_backend - {messages.Welcome, messages.Refused}),
    ):
        yield f"### {title}\n\n| message | fields | meaning |\n| --- | --- | --- |"
        for kind in sorted(kinds, key=lambda kind: list(vars(messages)).index(kind.__name__)):
            fields = ", ".join(field.encode_name for field in msgspec.structs.fields(kind))
            told = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
            yield f"| `{kind.__struct_config__.tag}` | {fields} | {told} |"
        yield ""


def build(folder: Path) -> None:
    """Write man pages and completion for bash and zsh."""
    import shtab
    from argparse_manpage.manpage import Manpage  # type: ignore[import-untyped]

    for shell in ("bash", "zsh", "man"):
        (folder / (shell if shell == "man" else f"completion/{shell}")).mkdir(parents=True, exist_ok=True)
    for name, parser in parsers().items():
        section = 1 if name == "coherencectl" else 8
        manual = Manpage(parser, {"manual_title": "coherent-vfs", "manual_section": section})
        (folder / f"man/{name}.{section}").write_text(str(manual))
        (folder / f"completion/bash/{name}").write_text(shtab.complete(parser, "bash"))
        (folder / f"completion/zsh/_{name}").write_text(shtab.complete(parser, "zsh"))


def main(words: list[str]) -> None:
    for path, text in pages().items():
        path.write_text(text)
    for folder in words:
        build(CHECKOUT / folder)


if __name__ == "__main__":
    main(sys.argv[1:])
