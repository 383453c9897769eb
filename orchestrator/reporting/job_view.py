"""A job's values with the places they come from, as people see them."""

from collections.abc import Iterator

from rayprune.orchestrator.reporting.tables import Part, Table
from rayprune.specs.job import JobSpec
from rayprune.specs.located import Located, shown
from rayprune.specs.origins import DEFAULT, Origin, origins
from rayprune.specs.recipe import recipe


def origin_parts(job: JobSpec, said: Located, defaults: bool) -> Iterator[Part]:
    """Every value that is said somewhere, or, with `defaults`, every value."""
    found = origins(job, said)
    shown_ones = [origin for origin in found if defaults or origin.where != DEFAULT]
    rows = [[each.field, shown(each.value), each.where] for each in shown_ones]
    yield Table("values of the job", ["field", "value", "from"], rows)
    if not defaults:
        yield f"{len(found) - len(shown_ones)} more are defaults: --all shows them"
    yield from recipe_parts(job, said)


def recipe_parts(job: JobSpec, said: Located) -> Iterator[Part]:
    """What a job has from its recipe, where it names one."""
    if job.recipe is None:
        return
    where = recipe(job.recipe).job.where
    given = [_line(each) for each in origins(job, said) if each.where == where]
    yield f"recipe {job.recipe}: {recipe(job.recipe).about}"
    yield f"from the recipe: {', '.join(given) or 'nothing, the job says all of it itself'}"


def _line(origin: Origin) -> str:
    return f"{origin.field}: {shown(origin.value)}"
