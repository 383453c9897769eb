"""Recipes: what a job says wins over them, and every value says where it comes from."""

from pathlib import Path
from typing import Any

import pytest

from rayprune.specs.errors import SpecError
from rayprune.specs.loader import dump_job, load_job, read_job
from rayprune.specs.origins import origins
from rayprune.specs.recipe import RECIPES, RecipeName, recipe

FOLDER = Path(__file__).parents[3] / "specs" / "recipes"
REQUIRED: dict[str, Any] = {"model": {"path": "m"}, "calibration": {"path": "c"}}


def test_names_and_files_agree() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_job_with_a_recipe_is_one_that_says_all_of_it(name: RecipeName, tmp_path: Path) -> None:
    job = load_job(REQUIRED | {"recipe": name})
    given = recipe(name).job.plain()
    own = {section: given.get(section, {}) | fields for section, fields in REQUIRED.items()}
    written_out = load_job(given | own)
    assert job.result_part() == written_out.result_part()
    assert job == written_out.model_copy(update={"recipe": name})
    (tmp_path / "job.yaml").write_text(dump_job(job))
    assert load_job(tmp_path / "job.yaml") == job


def test_what_the_job_says_wins() -> None:
    said = {"correction": {"drift": 0.25}, "budget": {"sparsity": 0.3}, "recover": None}
    job = load_job(REQUIRED | {"recipe": "best"} | said, ["method.scale=weights"])
    assert (job.correction.drift, job.budget.per_layer, job.recover) == (0.25, True, None)
    assert (job.method.name, job.method.selector.gradient_windows) == ("stat", 0)


@pytest.mark.parametrize("method", ["obs", {"name": "obs", "rounds": 8}])
def test_another_method_is_taken_as_the_job_has_it(method: Any) -> None:
    given = REQUIRED | {"recipe": "balanced", "method": method}
    assert load_job(given).method == load_job(REQUIRED | {"method": method}).method


def test_the_name_alone_keeps_the_recipe_s_options() -> None:
    given = REQUIRED | {"recipe": "balanced", "method": "stat"}
    assert load_job(given).method == load_job(REQUIRED | {"recipe": "balanced"}).method


def test_a_section_set_to_null_is_none_of_the_recipe_s() -> None:
    given = {"method": "none", "budget": None, "correction": None}
    job = load_job(REQUIRED | {"recipe": "best"} | given)
    assert (job.budget, job.correction.drift) == (load_job(REQUIRED).budget, 0.0)
    assert job.recover
    assert job.recover.own_samples == 384
    assert load_job(REQUIRED | {"recipe": "best"}, ["calibration.own=null"]).calibration.own is None
    with pytest.raises(SpecError, match="budget: must be a section of fields"):
        load_job(REQUIRED | {"budget": None})


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(SpecError, match='did you mean "balanced"'):
        load_job(REQUIRED | {"recipe": "balancd"})


def test_a_contradiction_names_what_the_recipe_gives() -> None:
    with pytest.raises(SpecError, match=r"recipe balanced gives .*correction\.drift: 0\.5"):
        load_job(REQUIRED | {"recipe": "balanced"}, ["parallel.placement=layers"])


def test_every_value_says_where_it_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "recipe: balanced\nmodel: {path: m}\ncalibration:\n  path: c\nmethod: stat\n"
        "export: {target: vllm}\n"
    )
    found = {each.field: each.where for each in origins(*read_job(file, ["budget.sparsity=0.3"]))}
    assert found["calibration.path"] == f"{file}:4"
    assert found["budget.sparsity"] == "--set budget.sparsity=0.3"
    assert (found["method.name"], found["method.scale"]) == (f"{file}:5", "recipe balanced")
    assert found["export.target"] == f"{file}:6"
    assert found["parallel.workers"] == found["method.gradient_samples"] == "default"


def test_what_a_recipe_gives_is_told_only_where_fields_do_not_go_together() -> None:
    with pytest.raises(SpecError) as caught:
        load_job(REQUIRED | {"recipe": "balanced"}, ["budget.sparcity=0.1"])
    assert "recipe balanced gives" not in str(caught.value)
