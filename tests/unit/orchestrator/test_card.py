"""The card of a pruned model: read back as the Hub reads it, and as a person does."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from rayprune.orchestrator.hub.origin import origin_of
from rayprune.orchestrator.reporting.card import model_card
from rayprune.orchestrator.reporting.report import Report
from tests.unit.orchestrator.test_html_report import make_report

DENSE = {
    "name": "SmolLM2",
    "hub_id": "owner/SmolLM2",
    "licence": {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
    "units": {"heads": 4, "neurons": 1536},
}
CALIBRATION = {
    "path": "/secret/a.txt",
    "mix": [{"path": "/secret/b|<b>.txt"}],
    "samples": 64,
    "sequence_length": 512,
}


def card_of(recovered: bool = False, **changes: Any) -> str:
    facts = {"run": "/secret/run", "dense": DENSE, "calibration": CALIBRATION}
    return model_card(Report.model_validate(make_report() | facts | changes), recovered)


def test_the_hub_reads_what_it_looks_for() -> None:
    data = ModelCard(card_of()).data.to_dict()
    assert data["base_model"] == "owner/SmolLM2"
    assert data["license_name"] == "mine"
    assert data["tags"] == ["rayprune", "pruned", "stat"]
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["name"] == "held.txt"
    assert result["metrics"][0]["value"] == 28.2271
    assert "20 windows of 1,024 tokens, stride 512" in result["metrics"][0]["name"]


def test_a_person_reads_sizes_quality_and_limits() -> None:
    card = card_of()
    assert "| FFN channels of a layer | 1,536 | 1,120 |" in card
    assert "| perplexity on held.txt | 22.0011 | 28.2271 |" in card
    assert "64 windows of 512 tokens of a.txt, b&#124;&lt;b&gt;.txt." in card
    assert "secret" not in card
    assert "trust_remote_code" not in card


def test_what_is_not_known_is_not_claimed() -> None:
    card = card_of(dense={**DENSE, "hub_id": None, "licence": {}}, perplexity=None)
    data = ModelCard(card).data.to_dict()
    assert not {"base_model", "license", "model-index"} & data.keys()
    assert "Its quality was not measured." in card


def test_an_encoder_is_told_of_as_one() -> None:
    card = card_of(
        perplexity=None,
        masked_lm_loss={"before": 2.0, "after": 2.5},
        embeddings={"cosine": 0.98, "least_cosine": 0.9},
        models={"auto_class": "AutoModelForMaskedLM"},
    )
    data = ModelCard(card).data.to_dict()
    assert data["pipeline_tag"] == "fill-mask"
    results = data["model-index"][0]["results"]
    metrics = [metric for result in results for metric in result["metrics"]]
    assert {each["type"]: each["value"] for each in metrics} == {
        "masked_lm_loss": 2.5,
        "embedding_cosine": 0.98,
    }
    assert "from transformers import AutoModelForMaskedLM, AutoTokenizer" in card


def test_a_recovered_model_has_its_own_numbers() -> None:
    perplexity = {"before": 22.0, "after": 28.0, "recovered": 25.0}
    card = card_of(recovered=True, perplexity=perplexity, models={"own_class": True})
    assert "| 22.0000 | 25.0000 |" in card
    assert "and trained afterwards" in card
    assert 'from_pretrained("FOLDER", trust_remote_code=True)' in card


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\nlicense_link: [1]\n---\n# A", {"license": "mit"}),
        ("# no head", {}),
        ("---\n- a list\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n" + "[" * 5000 + "\n---\n", {}),
        ("\xff", {}),
    ],
)
def test_the_licence_is_what_the_source_says(
    text: str, found: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(text, encoding="latin-1")
    assert origin_of(tmp_path).licence == found


def test_a_name_comes_from_the_cache_of_the_hub_alone(tmp_path: Path) -> None:
    cached = origin_of(tmp_path / "models--owner--name" / "snapshots" / "0c")
    assert (cached.name, cached.hub_id, cached.revision) == ("name", "owner/name", "0c")
    assert (origin_of(tmp_path / "a" / "b").name, origin_of(tmp_path / "a" / "b").hub_id) == (
        "b",
        None,
    )
    assert origin_of(tmp_path / "a" / "model").name == "a"


def test_a_card_that_leads_elsewhere_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").symlink_to(tmp_path / "other")
    assert origin_of(tmp_path / "model").licence == {}
