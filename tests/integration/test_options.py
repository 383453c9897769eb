"""A changed job goes on in the same run folder: what depends on the change is done again, and
nothing else.

Every option that a result may depend on is changed on a tiny model. The bytes of all tasks are
those of a new folder: an option that a task reads without saying so would leave its old bytes.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.random_model import byte_tokenizer
from rayprune.orchestrator.execution.run_folder import read_events
from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.run import run_job
from rayprune.orchestrator.stages.reads import READS, kind_of, options_read
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from rayprune.workers.store.files import read_manifest
from rayprune.workers.store.layout import RESULT_FILE, task_folder
from tests.conftest import MakeJob
from tests.helpers import quiet, some
from tests.models import begun, build_model

TRAINING = {"batch": 4, "learning_rate": 1e-3}
BASES: dict[str, dict[str, Any]] = {
    "shards": {},
    "recover": {"recover": TRAINING},
    "gradients": {"method": {"scale": "gradients", "gradient_samples": 4}},
    "qr": {"method": {"factorization": "qr"}, "correction": {"damping": 0.1}},
    "layers": {"parallel": {"placement": "layers"}},
    "adapters": {"recover": TRAINING | {"lora": {"rank": 2}}},
    "refit": {
        "parallel": {"placement": "layers", "propagation": "refit"},
        "correction": {"drift": 0.5},
    },
    "curves": {
        "budget": {"per_layer": True, "allocation": {"name": "curves", "samples": 2, "levels": 4}}
    },
    "search": {
        "budget": {
            "per_layer": True,
            "allocation": {
                "name": "search",
                "samples": 2,
                "levels": 4,
                "generations": 2,
                "offspring": 3,
            },
        }
    },
    "threshold": {
        "method": {"name": "numerical"},
        "budget": {"per_layer": True, "allocation": "threshold"},
    },
    "obs": {"method": {"name": "obs", "rounds": 4}},
    "dress": {"method": {"name": "dress", "training": TRAINING}},
    "dress by layer": {
        "method": {"name": "dress", "scope": "layer", "mask": "flap", "training": TRAINING}
    },
    "trsp": {"method": {"name": "trsp", "gates": TRAINING, "training": TRAINING}},
}
CHANGES: dict[str, list[str]] = {
    "shards": [
        "model.dtype=bfloat16",
        "calibration.samples=12",
        "calibration.sequence_length=48",
        "calibration.shards=5",
        "calibration.held_out_shards=2",
        "calibration.bos=false",
        "calibration.path=OTHER",
        "calibration.format=jsonl;calibration.path=LINES",
        "calibration.mix=[{path: OTHER, weight: 0.5}]",
        "calibration.own={length: 16, batch: 4}",
        "calibration.own={length: 16, batch: 4, dtype: bfloat16}",
        "budget.sparsity=0.4",
        "budget.parameters=30000",
        "budget.weight_bytes=120000",
        "budget.flops_per_token=60000",
        "budget.kv_bytes_per_token=200",
        "budget.memory={bytes: 130000, context: 10}",
        "budget.kv_groups=1",
        "budget.round_to=16",
        "budget.probe_samples=2",
        "budget.probe_layers=1",
        "budget.per_layer=true",
        "budget.drop_layers=[1]",
        "budget.drop_layers=1;budget.drop_score=divergence;budget.drop_samples=2",
        "method=flap",
        "method=wanda",
        "method.factorization=qr",
        "method.scale=gradients",
        "method.shrinkage=0.5",
        "correction.damping=0.5",
        "correction.candidates=[0.2, 0.9]",
        "correction.drift=0.5",
        "parallel.placement=layers",
        "parallel.threads_per_worker=2",
        "parallel.micro_batch=3",
        "export.dtype=bfloat16",
        "export.target=vllm",
        "export.tensor_parallel=2",
        "evaluation.window=24",
        "evaluation.stride=8",
        "evaluation.bos=false",
        "evaluation.max_windows=2",
        "evaluation.path=OTHER",
        "parallel.device=auto",
    ],
    "recover": [
        "recover.learning_rate=1e-4",
        "recover.samples=8",
        "recover.samples=40",
        "calibration.own={length: 16, batch: 4};recover.own_samples=6",
        "recover.epochs=2",
        "recover.batch=2",
        "recover.schedule=linear",
        "recover.warmup=0.5",
        "recover.weight_decay=1",
        "recover.clip=0.01",
        "recover.dtype=bfloat16",
        "recover.seed=1",
        "recover.lora={rank: 2}",
        "recover.loss=lm",
        "recover.hidden=1.0",
        "recover.teacher_top=8",
        "recover.held_out={windows: 2, every: 2}",
        "recover.text={path: OTHER, samples: 9, sequence_length: 48}",
    ],
    "gradients": ["method.gradient_samples=2", "parallel.micro_batch=3", "model.dtype=bfloat16"],
    "qr": ["method.factorization=gram", "correction.damping=0.2", "correction.damping=held-out"],
    "layers": [
        "parallel.propagation=refit",
        "calibration.path=OTHER",
        "calibration.held_out_shards=2",
        "parallel.micro_batch=3",
        "export.dtype=bfloat16",
    ],
    "adapters": ["recover.lora.rank=3", "recover.lora.alpha=8"],
    "refit": ["correction.drift=1.0", "budget.sparsity=0.3", "calibration.samples=12"],
    "curves": [
        "budget.allocation.objective=max",
        "budget.allocation.samples=3",
        "budget.allocation.levels=6",
        "budget.allocation.least=0.9",
        "budget.allocation.most=1.5",
        "budget.allocation.influence=0.5",
        "budget.sparsity=0.35",
        "budget.kv_groups=1",
        "correction.damping=0.3",
        "export.pad=true",
    ],
    "search": [
        "budget.allocation.generations=3",
        "budget.allocation.offspring=5",
        "budget.allocation.seed=3",
    ],
    "threshold": [
        "method.penalty=10",
        "method.damping=1.0",
        "method.head_score=times-cost",
        "method=flap",
        "budget.sparsity=0.35",
    ],
    "obs": ["method.rounds=1", "method.swaps=3", "method.damping=1.0"],
    "dress": [
        "method.mask=wanda",
        "method.scope=layer",
        "method.norm=l1",
        "method.strength=0.9",
        "method.seed=4",
        "method.loss=distillation",
        "method.training.learning_rate=1e-2",
        "method.training.samples=40",
        "correction.damping=0.5",
    ],
    "dress by layer": [
        "method.mask=obs",
        "method.strength=0.9",
        "method.training.seed=4",
        "parallel.micro_batch=3",
    ],
    "trsp": [
        "method.gate_strength=1.0",
        "method.transfer=penalty",
        "method.shrink_strength=0.5",
        "method={name: trsp, transfer: penalty, update_strength: 1.0, norm: l1}",
        "method.protect_first=1",
        "method.protect_last=1",
        "method.gates.learning_rate=1e-4",
        "method.loss=distillation",
        "method.training.epochs=2",
    ],
}
NOT_CHANGED = {
    "schema_version": "there is one",
    "model.path": "identity",
    "model.revision": "a folder has none",
    "calibration.field": "plain text has none",
    "calibration.own.engine": "needs vLLM: test_own_text.py",
    "budget.latency_ms": "needs a table of measured times",
    "budget.latency_table": "needs a table of measured times",
    "budget.tokens_per_second": "needs a table of measured times",
    "budget.experts": "needs experts: test_experts.py",
    "budget.expert_score": "needs experts: test_experts.py",
    "budget.allocation.name": "changed with per_layer and threshold",
    "method.name": "changed as method",
}


def settings(change: str, folder: Path) -> list[str]:
    """`--set` words, with the texts in place."""
    for name in ("OTHER", "LINES"):
        change = change.replace(name, str(folder / f"{name.lower()}.txt"))
    return [word for word in change.split(";") if not word.endswith("=") and word]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Model and texts."""
    path = tmp_path_factory.mktemp("options")
    text = text_file.read_text(encoding="utf-8")
    build_model(path / "dense", num_hidden_layers=2)
    begun(byte_tokenizer()).save_pretrained(path / "dense")
    (path / "held_out.txt").write_text(text[40_000:44_000], encoding="utf-8")
    (path / "other.txt").write_text(text[50_000:], encoding="utf-8")
    lines = [json.dumps({"text": text[start : start + 500]}) for start in range(0, 20_000, 500)]
    (path / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    return path


def job_of(base: str, folder: Path, make_job: MakeJob, *words: str) -> JobSpec:
    evaluation = {"path": str(folder / "held_out.txt"), "window": 32, "max_windows": 4}
    return load_job(
        make_job(folder / "dense", **({"evaluation": evaluation} | BASES[base])), list(words)
    )


def finished(base: str, folder: Path, make_job: MakeJob) -> Path:
    """The run folder of a base; it runs once."""
    if not (folder / base).exists():
        run_job(job_of(base, folder, make_job), folder / base, quiet)
    return folder / base


def made(run: Path) -> dict[str, Any]:
    """What every planned task has made, by name, but for times and memory."""
    tasks, found = json.loads((run / "plan.json").read_text())["tasks"], {}
    for task in tasks:
        manifest = read_manifest(task_folder(run, task))
        assert manifest is not None
        files = {name: record for name, record in manifest.files.items() if name != RESULT_FILE}
        found[task] = files, manifest.info.get("result"), manifest.info.get("kept")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "change"), [(base, change) for base, changes in CHANGES.items() for change in changes]
)
def test_a_change_in_the_same_folder_gives_the_bytes_of_a_new_one(
    base: str, change: str, folder: Path, make_job: MakeJob, tmp_path: Path
) -> None:
    shutil.copytree(finished(base, folder, make_job), tmp_path / "same")
    job = job_of(base, folder, make_job, *settings(change, folder))
    reports = [run_job(job, tmp_path / name, quiet) for name in ("same", "new")]
    assert made(tmp_path / "same") == made(tmp_path / "new")
    assert reports[0].perplexity == reports[1].perplexity
    assert reports[0].training.keys() == reports[1].training.keys()
    verify_run(tmp_path / "same")


def leaves(document: Mapping[str, Any], name: str = "") -> Iterator[str]:
    """Dotted names of all options."""
    for key, value in document.items():
        path = f"{name}.{key}" if name else key
        if isinstance(value, Mapping):
            yield from leaves(value, path)
        else:
            yield path


def test_every_option_is_changed_above(make_job: MakeJob, folder: Path) -> None:
    changed = "\n".join(change for changes in CHANGES.values() for change in changes)
    for base in BASES:
        for option in leaves(job_of(base, folder, make_job).result_part()):
            section, _, last = option.partition(".")
            trained = section == "method" and ("training." in option or "gates." in option)
            assert (
                trained  # as those of `recover`
                or option in NOT_CHANGED
                or f"{option}=" in changed
                or last.rpartition(".")[2] + ":" in changed
            ), f"{option}: change it"


def test_every_task_says_what_it_reads(make_job: MakeJob, folder: Path) -> None:
    for base in BASES:
        job = job_of(base, folder, make_job)
        for task in READS:
            assert options_read(job, task).keys() == set(READS[task])
    assert {kind_of("layer-0012"), kind_of("evaluate-before")} == {"layer", "evaluate-before"}


@pytest.mark.parametrize(
    "change",
    [
        "parallel.workers=2",
        "cluster.executor=ray parallel.workers=2 parallel.transport=collective",
        "parallel.retries=9",
        "parallel.step_seconds=9",
        "memory.checkpoint_layers=1",
        "cluster.wait_seconds=9",
        "cluster.start_seconds=9",
        "cluster.connect_seconds=9",
        "recover.micro_batch=2",
        "recover.checkpoint_steps=1",
    ],
)
def test_no_task_reads_where_and_how_it_is_computed(
    change: str, make_job: MakeJob, folder: Path
) -> None:
    before, after = (job_of("recover", folder, make_job, *words) for words in ((), change.split()))
    for task in READS:
        assert options_read(before, task) == options_read(after, task)


RUN_AGAIN: dict[str, set[str]] = {
    "budget.sparsity=0.4": {"shape", "layer", "export", "recover"},
    "method.factorization=qr": {"shape", "layer", "export", "recover"},
    "correction.damping=0.5": {"shape", "layer", "export", "recover"},
    "calibration.samples=12": {
        "calibration-tokens",
        "recovery-tokens",
        "evaluation-tokens",
        "shape",
        "layer",
        "export",
        "recover",
    },
    "export.dtype=bfloat16": {"shape", "layer", "outer", "export", "recover"},
    "evaluation.window=24": {"evaluation-tokens"},
    "evaluation.max_windows=2": {"evaluation-tokens"},
    "recover.learning_rate=1e-4": {"recover"},
    "recover=": {"nothing"},
    "budget.probe_layers=1": {"shape"},
}


@pytest.mark.parametrize("change", some(RUN_AGAIN, "evaluation.window=24"))
def test_what_runs_again_after_a_change(
    change: str, make_job: MakeJob, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished("recover", folder, make_job), tmp_path / "run")
    before = sum(event["event"] == "task-done" for event in read_events(tmp_path / "run"))
    words = ["recover=null"] if change == "recover=" else [change]
    run_job(job_of("recover", folder, make_job, *words), tmp_path / "run", quiet)
    done = [
        kind_of(event["task"])
        for event in read_events(tmp_path / "run")
        if event["event"] == "task-done"
    ][before:]
    expected = RUN_AGAIN[change] - {"nothing"}
    if "evaluation-tokens" in expected:
        expected |= {"evaluate-after", "evaluate-recovered"}
        expected |= {"evaluate-before"} if change.startswith("evaluation") else set()
    elif "layer" in expected:
        expected |= {"evaluate-after", "evaluate-recovered"}
    elif "recover" in expected:
        expected |= {"evaluate-recovered"}
    assert set(done) == expected
    stale = [e for e in read_events(tmp_path / "run") if e["event"] == "task-stale"]
    assert {kind_of(event["task"]) for event in stale} == expected
    assert all(event["changed"] for event in stale)
    assert len(done) == len(stale)
