"""The page: parsed as a browser and as XML would."""

import copy
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import pytest

from rayprune.orchestrator.reporting.charts import ticks
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
        "evaluation": {
            "path": "held.txt",
            "texts": None,
            "tokenizer": None,
            "window": 1024,
            "stride": 512,
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
    return html_report(Report.model_validate(report | {"run": "/runs/one"}))


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


def points(svg: ET.Element, series: str) -> list[tuple[float, float]]:
    """Where the data points of a series are; the legend's point names no layer."""
    circles = [
        c
        for c in svg.iter("circle")
        if c.get("class") == series and (c.findtext("title") or "").startswith("layer ")
    ]
    return [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in circles]


def test_the_content_is_there_in_order() -> None:
    page = Page(page_of(make_report()))
    words = [
        "stat: 20.3% of the decoder parameters removed",
        "KV groups 3, FFN channels 1,120",
        "Parameters",
        "112.95 M",
        "from 134.52 M",
        "ratio 0.8397",
    ]
    words += [
        "134,515,008 → 112,949,568",
        "Decoder parameters",
        "ratio 0.7969",
        "Bytes on disk",
        "430.90 MiB",
        "28.227",
        "ratio 1.2830",
    ]
    words += [
        "text held.txt · window 1,024 · stride 512 · 20 windows · 20,460 scored tokens",
        "KV groups",
        "FFN channels",
        "40.0 s in all",
    ]
    words += [
        "30.0 s · 75.0%",
        "worker-0",
        "3.00",
        "1,120 / 1,536",
        "0.03",
        "0.2500",
        "0.3125",
        "rayprune",
        "0.1.0",
        "torch",
        "2.13.0",
    ]
    place = page.text.index("\n", page.text.index("removed"))  # after the title of the window
    for word in words:
        place = page.text.index(word, place) + len(word)


def test_the_page_is_static_and_stands_alone() -> None:
    page = page_of(make_report())
    tags = Page(page).tags
    assert {"script", "link", "img", "iframe"}.isdisjoint(tag for tag, _ in tags)
    assert not any(
        {"src", "href"} & attributes.keys() or any(name.startswith("on") for name in attributes)
        for _, attributes in tags
    )
    assert "url(" not in page
    assert "@import" not in page
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    headers = [attributes.get("scope") for tag, attributes in tags if tag == "th"]
    assert set(headers) == {"col", "row"}


@pytest.mark.parametrize("num_layers", [1, 2, 30, 126])
def test_a_point_per_layer_and_series(num_layers: int) -> None:
    heads, neurons, _ = svgs(page_of(make_report(num_layers)))
    for svg in (heads, neurons):
        for series in ("training", "held-out"):
            places = points(svg, series)
            assert len(places) == num_layers
            assert places == sorted(places)
            _, _, width, height = map(float, svg.get("viewBox", "").split())
            assert all(0 < x < width and 0 < y < height for x, y in places)
    shown = [
        text
        for svg in (heads,)
        for text in svg.iter("text")
        if (text.text or "").isdigit() and text.get("class") == "middle"
    ]
    assert len(shown) <= 20
    assert shown[0].text == "0"


def test_panels_share_a_linear_scale() -> None:
    report = make_report(1)
    report["layers"][0]["groups"] = {"heads": group(3, 4, 0.0), "neurons": group(3, 4, 0.2)}
    heads, neurons, _ = svgs(page_of(report))
    [(_, zero)], [(_, low)], [(_, high)] = (
        points(heads, "training"),
        points(neurons, "training"),
        points(neurons, "held-out"),
    )
    assert (zero - high) / (zero - low) == pytest.approx(1.25, abs=0.01)
    [label] = [text for text in neurons.iter("text") if text.text == "0.2"]
    assert float(label.get("y", "")) - 4 == pytest.approx(low, abs=0.1)


def test_layers_that_were_not_pruned_leave_gaps() -> None:
    report = make_report(5)
    report["layers"][0]["groups"] = {}
    del report["layers"][2]["groups"]["heads"]
    page = page_of(report)
    heads, neurons, _ = svgs(page)
    assert (len(points(heads, "held-out")), len(points(neurons, "held-out"))) == (3, 4)
    [line] = [
        path.get("d", "")
        for path in heads.iter("path")
        if path.get("class") == "held-out" and "H" not in path.get("d", "")
    ]
    assert (line.count("M"), line.count("L")) == (2, 1)
    assert Page(page).text.count("not pruned") == 1


def test_nothing_pruned_nothing_measured() -> None:
    report = make_report(2) | {
        "perplexity": None,
        "evaluation": None,
        "seconds": {"total": 0},
        "peak_memory_bytes": {},
    }
    for layer in report["layers"]:
        layer["groups"] = {}
    page = page_of(report)
    assert len(svgs(page)) == 1
    text = Page(page).text
    assert "Nothing was pruned." in text
    assert "Perplexity was not measured." in text
    assert "None" not in text


def test_errors_of_zero_have_a_scale() -> None:
    report = make_report(1)
    report["layers"][0]["groups"] = {"heads": group(4, 4, 0.0)}
    assert len(points(svgs(page_of(report))[0], "training")) == 1


def test_names_are_text() -> None:
    plain, report = Page(page_of(make_report())), make_report()
    for section in ("environment", "seconds", "peak_memory_bytes", "method", "shape"):
        key = next(iter(report[section])) if section != "method" else "factorization"
        report[section] = {
            SCRIPT if name == key else name: value for name, value in report[section].items()
        }
    report["method"] |= {"name": SCRIPT, SCRIPT: SCRIPT}
    report["environment"]["torch"] = report["rayprune_version"] = report["evaluation"]["path"] = (
        SCRIPT
    )
    for layer in report["layers"]:
        layer["groups"][SCRIPT] = layer["groups"].pop("heads")
    page = page_of(report)
    assert "<script" not in page
    assert {tag for tag, _ in Page(page).tags} == {tag for tag, _ in plain.tags}
    assert SCRIPT in Page(page).text
    assert len(svgs(page)) == 3


def test_terms_of_a_training_are_text() -> None:
    training = {"steps": [0], "curves": {SCRIPT: [1.0]}, "tokens_per_second": 1.0}
    page = page_of(make_report() | {"training": {SCRIPT: training}})
    assert "<script" not in page
    assert f"{SCRIPT}: {SCRIPT}" in [svg[0].text for svg in svgs(page)]


def test_warnings_are_shown_and_escaped() -> None:
    page = page_of(make_report())
    assert "Warning: 2,048 calibration tokens are 1.3 per FFN channel <b>" in " ".join(
        Page(page).text.split()
    )
    assert "Warning" not in page_of(make_report() | {"warnings": []})


def test_every_training_has_its_curves() -> None:
    training = {
        "steps": [0, 2, 4],
        "curves": {"lm": [3.5, 3.4, 3.45], "penalty": [40.0, 4.0, 0.0]},
        "tokens_per_second": 1234.0,
    }
    report = make_report() | {"training": {"gates": training, "recover": training}}
    report["perplexity"]["recovered"] = 25.0
    page = page_of(report)
    titles = [svg[0].text for svg in svgs(page)]
    assert titles[2:6] == ["gates: lm", "gates: penalty", "recover: lm", "recover: penalty"]
    assert svgs(page)[3][1].text == "from 40 to 0, least 0, most 40"
    assert "1,234 tokens per second" in Page(page).text
    assert "Perplexity, recovered" in Page(page).text


@pytest.mark.parametrize(
    ("least", "largest"), [(0.0, 0.0), (3.41, 3.42), (3.0, 3.0), (1e-9, 4e4), (0.0, 0.7)]
)
def test_ticks_hold_the_values(least: float, largest: float) -> None:
    marks = ticks(least, largest, 5)
    assert marks[0] <= least
    assert marks[-1] >= largest
    assert 2 <= len(marks) <= 7
