"""What the site takes from the project itself; MkDocs runs it as a hook (mkdocs.yml).

    ops/<op>.md                 signature, docstring, bench rows and plot, reference
    commands/<command>.md       what its --help prints
    COPIES                      whole files of the repository
    <!-- README: Heading -->    in a page: what README.md has below that heading
    <!-- module: NAME -->       in a page: the docstring of instructcore.NAME
    <!-- commands -->           in a page below commands/: a line for each

So each fact is written in one place, and a heading or module that is gone stops the build.
"""

from __future__ import annotations

import html
import importlib
import importlib.util
import inspect
import io
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from mkdocs.structure.files import File

from instructcore import cli, ops

ROOT = Path(__file__).resolve().parents[1]
COPIES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/LOG.md": "log.md",
    "bench/results/clients.md": "clients.md",
    "bench/results/suites.md": "suites.md",
}
OPS = [
    name
    for name in ops.__all__
    if inspect.isfunction(getattr(ops, name)) and not name.endswith("_reference")
]


def on_config(config):
    made = {"Ops": [f"ops/{op}.md" for op in OPS]}
    made["Commands"] = [f"commands/{name}.md" for name in cli.COMMANDS]
    sections = (item for entry in config.nav if isinstance(entry, dict) for item in entry.items())
    for title, children in sections:
        children.extend(made.get(title, []))


def on_files(files, config):
    for path, content in (*op_pages(), *command_pages()):
        files.append(File.generated(config, path, content=content))
    for source, path in COPIES.items():
        text = relink((ROOT / source).read_text("utf-8"))
        files.append(File.generated(config, path, content=text))


def on_page_markdown(markdown, **_):
    markdown = re.sub(r"^<!-- README: (.+) -->$", lambda m: readme(m[1]), markdown, flags=re.M)
    commands = (f"* [`{name}`]({name}.md): {c.help}" for name, c in cli.COMMANDS.items())
    markdown = markdown.replace("<!-- commands -->", "\n".join(commands))
    return re.sub(r"^<!-- module: (.+) -->$", lambda m: module(m[1]), markdown, flags=re.M)


def readme(heading: str) -> str:
    """What README.md has from a heading to the next one; "instructcore": the words before any."""
    text = (ROOT / "README.md").read_text("utf-8")
    text = text.replace("[中文](README.zh.md)\n", "").replace(r"\|", "|")
    _, *parts = re.split(r"^(?:# (?=instructcore\n)|##+ )(.+)\n", text, flags=re.M)
    body = dict(zip(parts[::2], parts[1::2], strict=True))[heading]
    body = re.sub(r"<details>.*?</details>", "", body, flags=re.S)  # every case: the ops' pages
    linked = "|".join(OPS)  # in the table of ops, which only ops/index.md shows
    return relink(re.sub(rf"^\| `({linked})`", r"| [`\1`](\1.md)", body, flags=re.M))


def relink(text: str) -> str:
    """Links to files of the repository lead to their page, or become the file's name."""

    def link(m: re.Match) -> str:
        if page := COPIES.get(m[2]):
            return f"[{m[1]}]({page})"
        return f"`{m[2]}`" if (ROOT / m[2]).exists() else m[0]

    return re.sub(r"\[([^\]]+)\]\(([^)#]+)\)", link, text)


def module(name: str) -> str:
    return "".join(docstring(importlib.import_module(f"instructcore.{name}").__doc__))


def command_pages() -> Iterator[tuple[str, str]]:
    for name, command in cli.COMMANDS.items():
        config = getattr(importlib.import_module(f"instructcore.{command.module}"), command.config)
        with mock.patch.dict(os.environ, COLUMNS="88", NO_COLOR="1"):
            text = cli.make_parser(name, command.help, config).format_help()
        yield f"commands/{name}.md", f"# {name}\n\n```text\n{text}```\n"


def op_pages() -> Iterator[tuple[str, str | bytes]]:
    spec = importlib.util.spec_from_file_location("plot", ROOT / "bench" / "plot.py")
    plot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot)
    results = plot.read()
    for op in OPS:
        function = getattr(ops, op)
        signature = inspect.getsource(function).partition('"""')[0].strip(" :\n")
        body = "".join(docstring(function.__doc__, op))
        lines = [f"# {op}\n{fenced(signature)}{body}"]
        for name in sorted(set(re.findall(r"\w+", signature + body)) & set(ops.__all__)):
            if inspect.isclass(kind := getattr(ops, name)):
                lines += [f"## {name}\n{fenced(inspect.getsource(kind))}"]
        if rows := [r for r in results if plot.kind_of(r).split("`")[1] == op]:
            picture = io.BytesIO()
            plot.plot(rows, picture)
            yield f"ops/{op}.png", picture.getvalue()
            lines += ["## Times", *plot.table(rows, plot.HEADERS["README.md"])]
            lines += [f"\n![{op}: time relative to ours]({op}.png)\n"]
        reference = getattr(ops, f"{op.rstrip('_')}_reference")
        lines += ["## Reference\n", "The definition, in plain torch:"]
        lines += [fenced(inspect.getsource(reference))]
        yield f"ops/{op}.md", "\n".join(lines)


def docstring(text: str, op: str = "") -> Iterator[str]:
    """Markdown of a docstring as CONTRIBUTING.md has them; on an op's page others are links."""
    for block in re.split(r"\n\n+", inspect.cleandoc(text)):
        section = re.match(r"(Args|Returns|Raises|Numerics|Source):\s", block)
        if section:
            yield f"\n## {section[1]}\n\n"
            block = textwrap.dedent(block[section.end() :])
        if block.startswith("    "):
            yield fenced(textwrap.dedent(block), "text")
        elif section and section[1] in ("Args", "Raises"):
            lead, *parts = re.split(r"^((?:\w+, )*\w+): ", block, flags=re.M)
            yield prose(lead, op)
            for names, meaning in zip(parts[::2], parts[1::2], strict=True):
                yield f"* `{names}`: {prose(meaning, op)}"
        else:
            yield prose(block.removesuffix("::") + ":" * block.endswith("::"), op)


def prose(text: str, op: str) -> str:
    """A paragraph whose signs stand for themselves, but for `code`; sources become links."""
    words = re.split(r"(`[^`]+`)", " ".join(text.split()))
    words[::2] = [
        re.sub(r"([\\*_\[\]])", r"\\\1", html.escape(part, quote=False)) for part in words[::2]
    ]
    if op:
        others = {f"`{other}`": f"[`{other}`]({other}.md)" for other in OPS if other != op}
        words[1::2] = [others.get(part, part) for part in words[1::2]]
    text = re.sub(r"arXiv:(\d+\.\d+)", r"[\g<0>](https://arxiv.org/abs/\1)", "".join(words))
    return re.sub(r"doi:([\w./]*\w)", r"[\g<0>](https://doi.org/\1)", text) + "\n\n"


def fenced(text: str, language: str = "python") -> str:
    return f"\n```{language}\n{text.rstrip()}\n```\n\n"
