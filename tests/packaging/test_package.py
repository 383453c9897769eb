"""The package outside its clone: what is in wheel and sdist, and an ordinary install beside
packages of the user that are named as our folders are. Nothing is downloaded.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from rayprune.specs.recipe import RECIPES
from tests.models import build_model

ROOT = Path(__file__).parents[2]
FOLDERS = ("specs", "workers", "orchestrator")
COPIED = ("rayprune", *FOLDERS, "tests", "benchmarks")
NOT_COPIED = shutil.ignore_patterns("__pycache__")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"
FROM_PYTHON = """
import sys, rayprune
report = rayprune.run(rayprune.load_job("job.yaml", sys.argv[2:]), sys.argv[1])
print("torch" in sys.modules, rayprune.__file__, report.model)
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def done(*words: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints; it has to end well."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        words, cwd=cwd, env=outside | environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the clone, so that building leaves nothing in it."""
    folder = tmp_path_factory.mktemp("source") / "clone"
    folder.mkdir()
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=NOT_COPIED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    """As `pip install .` builds it."""
    done(*PIP, "wheel", *OFFLINE, "-w", source.parent / "wheel", ".", cwd=source)
    (built,) = (source.parent / "wheel").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def sdist(source: Path) -> Path:
    done(sys.executable, "-c", BUILD.format("sdist"), source.parent / "sdist", cwd=source)
    (built,) = (source.parent / "sdist").glob("*.tar.gz")
    return built


def fresh_environment(folder: Path, package: Path) -> Path:
    """An environment with rayprune installed from a wheel; returns its folder of commands.

    The other packages are those of this one, by a line that is a mere path: it does not start the
    editable install of rayprune that this environment may have.
    """
    venv.create(folder, with_pip=False)
    done(*PIP, "--python", folder / "bin" / "python", "install", *OFFLINE, package, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh_environment(tmp_path_factory.mktemp("ordinary"), wheel)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A user's folder with a job, and with packages of their own that must never be imported."""
    folder = tmp_path_factory.mktemp("home")
    for name in FOLDERS:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('of the user')\n")
    build_model(folder / "dense")
    job = {
        "model": {"path": "dense"},
        "calibration": {"path": str(text_file), "samples": 16, "sequence_length": 64, "shards": 4},
        "budget": {"sparsity": 0.25, "round_to": 4},
        "parallel": {"workers": 1, "device": "cpu"},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder


def contents(package: Path) -> dict[str, bytes]:
    """The files of our package in a wheel or an sdist, by their names from `rayprune/` on."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
    else:
        with tarfile.open(package) as archive:
            files = {
                member.name.partition("/")[2]: found.read()
                for member in archive.getmembers()
                if (found := archive.extractfile(member))
            }
    return files


def expected() -> dict[str, bytes]:
    """The files that belong to the package."""
    names = [
        "rayprune/__init__.py",
        "rayprune/py.typed",
        "rayprune/specs/job.schema.json",
        "rayprune/workers/tools/demo_job.yaml",
    ]
    names += [f"rayprune/specs/recipes/{name}.yaml" for name in RECIPES]
    modules = [
        f"rayprune/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    ]
    return {name: (ROOT / name).read_bytes() for name in (*names, *modules)}


def test_a_wheel_has_our_files_and_nothing_else(wheel: Path) -> None:
    files = contents(wheel)
    ours = {name: content for name, content in files.items() if ".dist-info/" not in name}
    assert ours == expected()
    assert len(ours) > 100
    (entry_points,) = (files[name] for name in files if name.endswith("/entry_points.txt"))
    assert b"rayprune = rayprune.orchestrator.cli:main" in entry_points
    assert any(name.endswith("/licenses/LICENSE") for name in files)


def test_an_sdist_makes_the_same_wheel(sdist: Path, wheel: Path) -> None:
    files = contents(sdist)
    ours = {name: content for name, content in files.items() if name.startswith("rayprune/")}
    assert ours == expected()
    tops = {name.partition("/")[0] for name in files}
    assert tops <= {
        "rayprune",
        "rayprune.egg-info",
        "pyproject.toml",
        "setup.cfg",
        "PKG-INFO",
        "README.md",
        "LICENSE",
    }
    done(*PIP, "wheel", *OFFLINE, "-w", sdist.parent, sdist, cwd=sdist.parent)
    (second,) = sdist.parent.glob("*.whl")
    assert contents(second).keys() == contents(wheel).keys()
    assert expected().items() <= contents(second).items()


def test_an_editable_install_follows_the_clone(source: Path, home: Path, tmp_path: Path) -> None:
    """As `pip install -e` does it: by a wheel that names the clone."""
    done(sys.executable, "-c", BUILD.format("editable"), tmp_path, cwd=source)
    commands = fresh_environment(tmp_path / "environment", *tmp_path.glob("*.whl"))
    words = "import rayprune.workers.worker as w; print(w.__file__)"
    place = done(commands / "python", "-c", words, cwd=home, PYTHONPATH=str(home))
    assert place.strip() == str(source / "rayprune" / "workers" / "worker.py")
    assert done(commands / "rayprune", "--version", cwd=home).startswith("rayprune ")


def test_commands_beside_packages_of_the_same_names(commands: Path, home: Path) -> None:
    def rayprune(*words: str) -> str:
        return done(commands / "rayprune", *words, cwd=home, PYTHONPATH=str(home))

    assert rayprune("--version").startswith("rayprune ")
    assert "usage: rayprune" in rayprune("--help")
    assert "FFN channels" in rayprune("plan", "job.yaml")
    assert "wrote new.yaml" in rayprune(
        "init", "dense", "--aim", "tiny-memory", "--out", "new.yaml"
    )
    words = ("run", "job.yaml", "--set", "cluster.executor=in-process", "--out")
    assert "decoder_parameters" in rayprune(*words, "command")
    assert "agree with their records" in rayprune("verify", "command")


@pytest.mark.parametrize("executor", ["in-process", "ray"])
def test_python_beside_packages_of_the_same_names(
    executor: str, commands: Path, home: Path
) -> None:
    """Ray puts the current folder first on the path of its workers, which alone need torch."""
    words = (FROM_PYTHON, f"from-python-{executor}", f"cluster.executor={executor}")
    out = done(commands / "python", "-c", *words, cwd=home, PYTHONPATH=str(home))
    has_torch, place, model = out.split()[-3:]
    assert has_torch == str(executor == "in-process")
    assert Path(place).is_relative_to(commands.parent / "lib")
    assert (Path(model) / "config.json").exists()


def test_the_command_on_ray_beside_packages_of_the_same_names(commands: Path, home: Path) -> None:
    words = ("run", "job.yaml", "--out", "on-ray")
    out = done(commands / "rayprune", *words, cwd=home, PYTHONPATH=str(home))
    assert "run-finished" in out
