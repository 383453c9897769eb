"""rayprune: structured pruning of large language models, spread over a Ray cluster.

    report = rayprune.run("job.yaml", out="runs/one")

Names are imported when they are used first: `import rayprune` alone costs nothing, and neither
torch, transformers nor ray is imported before a run.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rayprune.orchestrator.entry import Progress as Progress
    from rayprune.orchestrator.entry import generate as generate
    from rayprune.orchestrator.entry import plan as plan
    from rayprune.orchestrator.entry import run as run
    from rayprune.orchestrator.entry import validate as validate
    from rayprune.orchestrator.planning.plan import Plan as Plan
    from rayprune.orchestrator.reporting.events import Event as Event
    from rayprune.orchestrator.reporting.report import Report as Report
    from rayprune.orchestrator.reporting.report import read_report as read_report
    from rayprune.specs.errors import ModelError as ModelError
    from rayprune.specs.errors import RaypruneError as RaypruneError
    from rayprune.specs.errors import ResourceError as ResourceError
    from rayprune.specs.errors import SpecError as SpecError
    from rayprune.specs.errors import VerificationError as VerificationError
    from rayprune.specs.job import JobSpec as JobSpec
    from rayprune.specs.loader import load_job as load_job
    from rayprune.specs.machine import MachineProfile as MachineProfile
    from rayprune.workers.network.zeros import load_sparse as load_sparse
else:
    _HOMES = {
        "rayprune.orchestrator.entry": ("Progress", "generate", "plan", "run", "validate"),
        "rayprune.orchestrator.planning.plan": ("Plan",),
        "rayprune.orchestrator.reporting.events": ("Event",),
        "rayprune.orchestrator.reporting.report": ("Report", "read_report"),
        "rayprune.specs.errors": (
            "ModelError",
            "RaypruneError",
            "ResourceError",
            "SpecError",
            "VerificationError",
        ),
        "rayprune.specs.job": ("JobSpec",),
        "rayprune.specs.loader": ("load_job",),
        "rayprune.specs.machine": ("MachineProfile",),
        "rayprune.workers.network.zeros": ("load_sparse",),
    }
    _HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
    __all__ = ["__version__", *_HOME_OF]

    def __getattr__(name):
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
        return found

    def __dir__():
        return [*globals(), *_HOME_OF]
