"""What the site has beside the documents: the README as its first page, pages made from the schema
and from the source, and the files of the repository that documents link to.
"""

import ast
import json
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
ERRORS = {"SpecError": 2, "ModelError": 3, "ResourceError": 4, "VerificationError": 5}
API = {
    "Plan and run": "rayprune.orchestrator.entry",
    "Jobs": "rayprune.specs.loader.load_job",
    "Reports": "rayprune.orchestrator.reporting.report.Report",
    "Events": "rayprune.orchestrator.reporting.events.Event",
    "Machines": "rayprune.specs.machine.MachineProfile",
    "Errors": "rayprune.specs.errors",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here, and what documents link to outside their folder."""
    made = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "]("),
        "reference/options.md": "".join(_options()),
        "reference/errors.md": "".join(_errors()),
        "reference/api.md": "".join(_api()),
        "reference/decisions.md": "".join(_decisions()),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    waiting = [(name, text) for name, text in made.items()]
    waiting += [(f.src_uri, f.content_string) for f in files if f.is_documentation_page()]
    seen: set[Path] = set()
    while waiting:
        name, text = waiting.pop()
        for _, target, _ in LINK.findall(text):
            path = _outside(name, target)
            if path is None or path in seen or not path.is_file():
                continue
            if path.is_relative_to(ROOT / "docs"):  # a page already
                continue
            seen.add(path)
            place = f"repository/{path.relative_to(ROOT)}"
            files.append(File.generated(config, place, content=path.read_bytes()))
            if path.suffix == ".md":
                waiting.append((place, path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links out of the folder of the documents lead to the copies; a folder is named alone."""
    return LINK.sub(lambda found: _relinked(found, page.file.src_uri), markdown)


def _source(name: str) -> Path:
    """The file that a page comes from."""
    if name == "index.md":
        return ROOT / "docs" / "README.md"  # its links were made those of the folder
    if name.startswith("repository/"):
        return ROOT / name.removeprefix("repository/")
    return ROOT / "docs" / name


def _outside(name: str, target: str) -> Path | None:
    """What a page links to, where that is no page of the documents."""
    if "://" in target or target.startswith("mailto:"):
        return None
    path = Path(os.path.normpath(_source(name).parent / target))
    if name == "index.md" and not path.exists():
        path = Path(os.path.normpath(ROOT / target))
    in_docs = path.is_relative_to(ROOT / "docs") and path.is_file()
    return None if in_docs and not name.startswith("repository/") else path


def _relinked(found: re.Match[str], name: str) -> str:
    before, target, after = found.groups()
    path = _outside(name, target)
    if path is None or not path.exists():
        return found[0]
    if path.is_dir():
        return (
            before
            + posixpath.relpath("reference/decisions.md", posixpath.dirname(name) or ".")
            + after
        )
    inside = path.relative_to(ROOT / "docs") if path.is_relative_to(ROOT / "docs") else None
    place = str(inside) if inside else f"repository/{path.relative_to(ROOT)}"
    if path == ROOT / "README.md":
        place = "index.md"
    return before + posixpath.relpath(place, posixpath.dirname(name) or ".") + after


def _options() -> Iterator[str]:
    """Every section of the schema as a table."""
    schema = json.loads((ROOT / "specs" / "job.schema.json").read_text(encoding="utf-8"))
    yield "# Options, from the schema\n\n"
    yield "What editors show. [The job file](../job.md) says more.\n\n"
    for name, section in {"job": schema, **schema["$defs"]}.items():
        yield f"## {name}\n\n{_line(section.get('description', ''))}\n\n"
        yield "| name | type | default | meaning |\n|---|---|---|---|\n"
        for field, given in section["properties"].items():
            default = json.dumps(given["default"]) if "default" in given else "**required**"
            about = _line(given.get("description", ""))
            yield f"| `{field}` | {_type(given)} | {_cell(default)} | {about} |\n"
        yield "\n"


def _type(given: dict[str, Any]) -> str:
    if "$ref" in given:
        name = given["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in given:
        return ", ".join(f"`{each}`" for each in given["enum"])
    if "const" in given:
        return f"`{given['const']}`"
    for several in ("anyOf", "oneOf"):
        if several in given:
            return ", ".join(dict.fromkeys(map(_type, given[several])))
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
    bounds |= {"exclusiveMaximum": "below"}
    limits = " and ".join(f"{word} {given[key]:g}" for key, word in bounds.items() if key in given)
    return " ".join(filter(None, (str(given.get("type", "")), limits)))


def _line(text: str) -> str:
    return _cell(" ".join(text.split()), code=False)


def _cell(text: str, code: bool = True) -> str:
    text = text.replace("|", "\\|")
    return f"`{text}`" if code and not text.startswith("**") else text


def _errors() -> Iterator[str]:
    """Every error that the code can tell, by what it begins with."""
    yield "# Errors\n\nEvery message that names a cause, as the code has it; `...` stands for what"
    yield " is filled in. The exit code says of which kind it is.\n\n"
    found: dict[str, set[str]] = {}
    for folder in ("specs", "workers", "orchestrator"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    name = ast.unparse(node.exc.func)
                    if name in ERRORS and node.exc.args:
                        found.setdefault(name, set()).add(_message(node.exc.args[0]))
    for name, code in ERRORS.items():
        yield f"## Exit code {code}\n\n"
        for text in sorted(found.get(name, set()), key=lambda text: text.strip(". :").lower()):
            if len(text.strip(". ")) > 12:
                yield f"- {text}\n"
        yield "\n"


def _message(node: ast.expr) -> str:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    text = "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts)
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _api() -> Iterator[str]:
    yield "# API\n\nFrom the docstrings. [From Python](../python.md) tells how it is used.\n\n"
    for title, name in API.items():
        yield f"## {title}\n\n::: {name}\n    options:\n      heading_level: 3\n"
        if name == "rayprune.orchestrator.entry":
            yield "      members: [plan, validate, run]\n      show_root_heading: false\n"
        yield "\n"


def _decisions() -> Iterator[str]:
    yield "# Decisions\n\nWhat was chosen, what else there was, and why.\n\n"
    for path in sorted((ROOT / "docs" / "decisions").glob("*.md")):
        title = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        yield f"- [{title}](../decisions/{path.name})\n"
