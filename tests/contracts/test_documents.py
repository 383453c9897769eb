"""The documents keep up with the code: every option is listed, every link leads somewhere, and the
site has every page.
"""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from rayprune.specs.explain import models
from rayprune.specs.job import JobSpec
from rayprune.specs.recipe import RECIPES
from tests.contracts import families_page

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])


def option_names() -> list[str]:
    """Every field of every section."""
    return sorted(_names_below(JobSpec) - JobSpec.model_fields.keys())


def _names_below(section: type[BaseModel]) -> set[str]:
    below = (model for field in section.model_fields.values() for model in models(field.annotation))
    return set(section.model_fields).union(*map(_names_below, below))


def test_every_option_is_documented() -> None:
    document = (ROOT / "docs" / "job.md").read_text()
    assert [name for name in option_names() if f"`{name}`" not in document] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    missing = [
        target
        for target in targets
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert not missing


def test_the_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_site_has_every_page() -> None:
    listed = re.findall(r": ([\w/-]+\.md)", (ROOT / "mkdocs.yml").read_text())
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    made = {"index.md", *(name for name in listed if name.startswith("reference/"))}
    assert set(listed) - made == {name for name in pages if not name.startswith("decisions/")}


def test_every_recipe_is_documented() -> None:
    document = (ROOT / "docs" / "recipes.md").read_text()
    assert [name for name in RECIPES if f"| `{name}` |" not in document] == []


def test_the_tables_of_families_are_those_of_their_files() -> None:
    """`python -m tests.contracts.families_page` writes both."""
    assert families_page.PAGE.read_text(encoding="utf-8") == families_page.page()
    text = families_page.README.read_text(encoding="utf-8")
    assert families_page.with_table(text, families_page.readme()) == text


def test_messages_that_are_explained_are_those_of_the_code() -> None:
    rows = (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    quoted = [found[1] for row in rows if (found := re.match(r"\| `([^`]+)`", row))]
    files = [
        file
        for room in ("orchestrator", "workers", "specs")
        for file in ROOT.glob(f"{room}/**/*.py")
    ]
    # texts over several lines, as one
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text() for file in files))
    parts = [part.strip(" =") for each in quoted for part in re.split(r"\.\.\.|\b[A-Z]+\b", each)]
    assert len(quoted) > 10
    assert [part for part in parts if part not in code] == ["ignore_mismatched_sizes"]
