"""The one module that knows Ray Train: a gang of ranks in one placement group. Its retries are off:
the driver retries.
"""

import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import ray.train
from ray.exceptions import RayError
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import RayTrainError
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from rayprune.orchestrator.execution.failures import Failure, WorkerFailure
from rayprune.specs.errors import RaypruneError
from rayprune.workers.store.training_stage import Finetune

MOST_SILENT_SECONDS = 600.0
_SILENCE = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"


class _Trainer(TorchTrainer):
    """A trainer that leaves interrupts to the command: Ray's handler would end the process as if
    all were well, and stay for good.
    """

    def _register_sigint_handler(self, controller: Any) -> None:
        """Register none."""


def train_on_ray(
    stage: Finetune, num_ranks: int, on_gpu: bool, storage: Path, silence: float
) -> None:
    """Run a training stage on so many ranks, from its last checkpoint if there is one. Ray Train's
    own retries are off, the driver retries. A rank that does not answer for `silence` seconds, or
    ten minutes, is lost; one that answers may work as long as it takes.

    Raises:
        RaypruneError: the stage's own error.
        WorkerFailure: a rank was lost, or the ranks cannot be scheduled.
    """
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    os.environ[_SILENCE] = str(math.ceil(min(silence, MOST_SILENT_SECONDS)))
    resources = {"CPU": float(stage.threads)} | ({"GPU": 1.0} if on_gpu else {})
    trainer = _Trainer(
        _rank,
        train_loop_config={"stage": stage, "device": "cuda" if on_gpu else "cpu"},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=num_ranks, use_gpu=on_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=f"{Path(stage.folder).name}-{time.time_ns()}", storage_path=str(storage)
        ),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        raise _cause(error) from None
    except TrainingFailedError as error:
        raise WorkerFailure(Failure.UNSCHEDULABLE, str(error).splitlines()[-1]) from None


def _cause(error: WorkerGroupError) -> BaseException:
    """What stopped a gang: our own error in a rank; a rank that was lost, or that lost its peers;
    else a bug in a rank.
    """
    raised: list[BaseException] = [
        getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()
    ]
    if own := [cause for cause in raised if isinstance(cause, RaypruneError)]:
        return own[0]
    if lost := [
        cause
        for cause in raised
        if isinstance(cause, (RayTrainError, RayError)) or _lost_its_peers(cause)
    ]:
        return WorkerFailure(Failure.PROCESS_LOST, str(lost[0]).splitlines()[0])
    return raised[0]


def _lost_its_peers(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone: torch has no class of its own for
    what gloo raises.
    """
    return type(error).__name__.startswith("Dist") or any(
        word in str(error).lower() for word in ("gloo", "nccl", "connection")
    )


def _rank(config: dict[str, Any]) -> None:
    from rayprune.workers.training.rank import train_rank

    os.environ.setdefault("OMP_NUM_THREADS", str(config["stage"].threads))
    ranks = ray.train.get_context()
    train_rank(config["stage"], ranks.get_world_rank(), ranks.get_world_size(), config["device"])
