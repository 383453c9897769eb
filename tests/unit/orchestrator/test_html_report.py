"""The page: parsed as a browser and as XML would."""

import copy
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import pytest

from rayprune.orchestrator.reporting import charts
from rayprune.orchestrator.reporting.html_report import html_report
from rayprune.orchestrator.reporting.report import Report

VOID = {"meta", "br"}
SCRIPT = "<script>alert('1')</script>&\""


def group(kept: int, of: int, error: float) -> dict[str, Any]:
    return {
        "kept": kept,
        "of": of,
        "damping": 0.03,
        "training_error": error,
        "held_out_error": error * 1.25,
    }


def make_report(num_layers: int = 4) -> dict[str, Any]:
    groups = {"heads": group(3, 4, 0.0625), "neurons": group(1120, 1536, 0.25)}
    return {
        "schema_version": 1,
        "rayprune_version": "0.1.0",
        "environment": {"torch": "2.13.0", "machine": "x86_64"},
        "dense": None,
        "finished": None,
        "steps": [],
        "closeness": {},
        "method": {"name": "stat", "factorization": "gram"},
        "shape": {"heads": 3, "neurons": 1120},
        "narrowest": {"heads": 3, "neurons": 1120},
        "parameters": {"before": 134_515_008, "after": 112_949_568},
        "decoder_parameters": {"before": 106_202_880, "after": 84_637_440},
        "bytes_on_disk": {"before": 538_090_408, "after": 451_828_656},
        "perplexity": {"before": 22.0011, "after": 28.2271},
        "texts": {},
        "samples": [],
        "scores": [],
        "timeline": [],
        "evaluation": {
            "path": "held.txt",
            "texts": None,
            "tokenizer": None,
            "tokens": None,
            "lm_eval": None,
            "tasks_batch": 1,
            "window": 1024,
            "stride": 512,
            "opening": "",
            "windows": 20,
            "scored_tokens": 20460,
        },
        "allocation": None,
        "calibration": {"path": "calibration.txt"},
        "step_seconds": {"collect": 20.0},
        "warnings": ["2,048 calibration tokens are 1.3 per FFN channel <b>"],
        "seconds": {"tokenize": 10.0, "sweep": 30.0, "total": 40.0},
        "peak_memory_bytes": {"driver": 2**29, "worker-0": 3 * 2**30},
        "training": {},
        "layers": [
            {"layer": number, "groups": copy.deepcopy(groups)} for number in range(num_layers)
        ],
        "records": {"tasks": {"outer": "0c" * 32}, "files": {"plan.json": "1d" * 32}},
    }


def page_of(report: dict[str, Any]) -> str:
    return html_report(Report.model_validate(report | {"run": "/runs/one"}), "model: {path: m}\n")


class Page(HTMLParser):
    """Tags in order with their attributes, and the visible text; tags have to nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += "" if "style" in self._open else f"{data}\n"


def svgs(page: str) -> list[ET.Element]:
    """Drawings, which have to be well-formed, named and described."""
    drawings = [ET.fromstring(part) for part in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    for svg in drawings:
        assert svg.get("role") == "img"
        assert svg.get("aria-labelledby") == svg[0].get("id")
        assert svg.get("aria-describedby") == svg[1].get("id")
        assert [(child.tag, bool(child.text)) for child in svg[:2]] == [
            ("title", True),
            ("desc", True),
        ]
    return drawings


def slice_of(tokens: int, ratio: float) -> dict[str, Any]:
    return {"tokens": tokens, "ratio": ratio, "divergence": 0.125, "agreement": 0.75}


def two_texts() -> dict[str, Any]:
    """What was measured of two texts."""
    texts = {}
    for name, ratio in (("wiki", 1.25), ("topics", 2.5)):
        before = {"windows": 10, "scored_tokens": 10_230, "perplexity": 20.0}
        after = before | {"perplexity": 20.0 * ratio, "divergence": 0.5, "agreement": 0.625}
        after |= {"slices": {"rare tokens": slice_of(1023, ratio * 2)}}
        texts[name] = {"before": before, "after": after}
    close = {"after": {"divergence": 0.5, "agreement": 0.625}}
    return {"texts": texts, "closeness": close}


def test_the_content_is_there_in_order() -> None:
    dense = {"name": "SmolLM2", "hub_id": None, "licence": {}, "units": {}}
    finished = {"finished": "2026-11-27T10:00:00+00:00", "dense": dense}
    samples = [{"prompt": "A <b>", "texts": {"before": "dense words", "after": "pruned words"}}]
    page = Page(page_of(make_report() | two_texts() | finished | {"samples": samples}))
    words = [
        "SmolLM2, 20.3% of the decoder parameters removed",
        "SmolLM2 is 16.0% smaller: 20.3% of its decoder parameters are gone.",
        "the same next token as the dense model for 62.5% of tokens",
        "1.250 times the dense one's on wiki, 2.500 times on topics",
        "KV groups 3, FFN channels 1,120",
        "27 November 2026, 10:00 UTC",
        "Warning:",
        "2,048 calibration tokens are 1.3 per FFN channel <b>",
        "112.95 M",
        "from 134.52 M",
        "ratio 0.8397",
        "134,515,008 → 112,949,568",
        "430.90 MiB",
        "28.227",
        "ratio 1.2830",
        "62.5%",
        "3.00 GiB",
        "40.0 s",
        "Quality",
        "wiki",
        "dense",
        "20.000",
        "pruned",
        "25.000 (× 1.250)",
        "topics",
        "20 windows of 1,024 tokens, stride 512, 20,460 scored tokens, of held.txt",
        "rare tokens",
        "1,023",
        "A <b>",
        "dense words",
        "pruned words",
        "What was removed",
        "1,120 of 1,536",
        "0.2500",
        "0.3125",
        "40.0 s in all",
        "75.0%",
        "worker-0",
        "How to load it",
        'AutoModelForCausalLM.from_pretrained("/runs/one/model")',
        "rayprune run job.yaml",
        "model: {path: m}",
        "2.13.0",
    ]
    place = page.text.index("\n", page.text.index("removed"))  # after the title of the window
    for word in words:
        assert word in page.text[place:], word
        place = page.text.index(word, place) + len(word)


@pytest.mark.usefixtures("drawn")
def test_the_page_is_static_and_stands_alone() -> None:
    training = {"steps": [0, 1], "curves": {"lm": [3.5, 3.4]}, "tokens_per_second": 1234.0}
    span = {"stage": "sweep", "start": 0.0, "seconds": 30.0, "busy": {"worker-0": 20.0}}
    report = make_report(30) | {"training": {"recover": training}, "timeline": [span]}
    page = page_of(report)
    assert len(page) < 200_000
    tags = Page(page).tags
    assert {"script", "link", "img", "iframe", "style"} & {tag for tag, _ in tags} == {"style"}
    assert [tag for tag, _ in tags].count("style") == 1
    named = {f"#{attributes['id']}" for _, attributes in tags if "id" in attributes}
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in tags:
        assert not any(name == "src" or name.startswith("on") for name in attributes)
        assert attributes.get("href", next(iter(named))) in named
    assert set(re.findall(r"url\((.*?)\)", page)) <= named
    assert "@import" not in page
    headers = [attributes.get("scope") for tag, attributes in tags if tag == "th"]
    assert set(headers) == {"col", "row"}
    heads, neurons, recover, timeline = svgs(page)
    assert neurons[1].text == "1,120 of 1,536 stay; the largest error is 0.3125"
    assert recover[0].text == "recover: lm"
    assert recover[1].text == "from 3.5 to 3.4, least 3.4, most 3.5"
    assert {"FFN channels: kept", "held-out", "layer"} <= {
        text.text for text in neurons.iter("text")
    }
    assert {"sweep", "worker-0"} <= {text.text for text in timeline.iter("text")}
    assert not re.findall(r"#0[1-6]0[1-6]0[1-6]", page), "colours are the page's"
    assert heads[0].text == "KV groups by layer"
    once, again = (charts.curve("a", "b", "c", [0, 1], [2, 3]) for _ in range(2))
    assert once == again


@pytest.mark.usefixtures("drawn")
def test_names_are_text() -> None:
    """In tables and in drawings."""
    report = make_report()
    for section in ("environment", "seconds", "peak_memory_bytes", "shape"):
        key = next(iter(report[section]))
        report[section] = {
            SCRIPT if name == key else name: value for name, value in report[section].items()
        }
    report["method"] |= {"name": SCRIPT, SCRIPT: SCRIPT}
    report["environment"]["torch"] = report["rayprune_version"] = report["evaluation"]["path"] = (
        SCRIPT
    )
    training = {"steps": [0], "curves": {SCRIPT + "$x$": [1.0]}, "tokens_per_second": 1.0}
    for layer in report["layers"]:
        layer["groups"][SCRIPT] = layer["groups"].pop("heads")
    page = page_of(report | {"training": {SCRIPT: training}})
    assert "<script" not in page
    assert SCRIPT in Page(page).text
    assert f"{SCRIPT}: {SCRIPT}$x$" in [svg[0].text for svg in svgs(page)]


def test_layers_that_were_not_pruned() -> None:
    report = make_report(5)
    report["layers"][0]["groups"] = {}
    del report["layers"][2]["groups"]["heads"]
    assert Page(page_of(report)).text.count("not pruned") == 1


def test_nothing_pruned_nothing_measured() -> None:
    report = make_report(2) | {
        "perplexity": None,
        "evaluation": None,
        "seconds": {"total": 0},
        "peak_memory_bytes": {},
        "warnings": [],
    }
    for layer in report["layers"]:
        layer["groups"] = {}
    text = Page(page_of(report)).text
    for words in ("Nothing was pruned.", "How good it is was not measured."):
        assert words in text
    assert "None" not in text
    assert "Warning" not in text
