"""The JSON schema of a job file, for editors. Write it with `python -m rayprune.specs.schema >
specs/job.schema.json`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayprune.specs.job import JobSpec

SCHEMA_ID = "urn:rayprune:job:1"
"""A name, not an address: with the package comes the schema of its version."""
SCHEMA_FILE = Path(__file__).with_name("job.schema.json")


def job_schema_text() -> str:
    """The JSON schema of a job, pretty-printed."""
    schema = JobSpec.model_json_schema()
    _name_all_but_the_default(schema)
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        **schema,
        "title": "rayprune job",
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _name_all_but_the_default(schema: dict[str, Any]) -> None:
    """Of the classes that a section may be, only the default one may leave its name out: without
    that rule a section without a name would be several of them.
    """
    sections = [schema, *schema["$defs"].values()]
    for field in (field for part in sections for field in part["properties"].values()):
        default = field.get("default")
        for name in _references(field) if isinstance(default, dict) else ():
            section = schema["$defs"][name]
            const = section["properties"].get("name", {}).get("const")
            if const not in (None, default.get("name")):
                section["required"] = ["name", *section.get("required", [])]


def _references(node: Any) -> Iterator[str]:
    """Names of the definitions that a part of a schema points to."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


if __name__ == "__main__":
    sys.stdout.write(job_schema_text())
