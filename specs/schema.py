"""The JSON schema of a job file, for editors. Write it with `python -m rayprune.specs.schema >
specs/job.schema.json`.
"""

import json
import sys

from rayprune.specs.job import JobSpec


def job_schema_text() -> str:
    """The JSON schema of a job, pretty-printed."""
    schema = JobSpec.model_json_schema()
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "rayprune job",
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(job_schema_text())
