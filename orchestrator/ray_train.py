"""The one module that knows Ray Train: a gang of ranks in one placement group, started again from the last checkpoint when one dies."""

import logging
import os
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.failures import Failure, WorkerFailure
from specs.errors import RaypruneError
from workers.finetune_stage import Finetune


def train_on_ray(stage: Finetune, num_ranks: int, on_gpu: bool, retries: int, storage: Path) -> None:
    """Run a training stage on so many ranks; a lost rank restarts the gang, at most `retries` times.

    Raises:
        RaypruneError: the stage's own error.
        WorkerFailure: ranks were lost too often, or cannot be scheduled.
    """
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    resources = {"CPU": float(stage.threads)} | ({"GPU": 1.0} if on_gpu else {})
    trainer = TorchTrainer(
        _rank,
        train_loop_config={"stage": stage, "device": "cuda" if on_gpu else "cpu"},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=num_ranks, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RunConfig(name=Path(stage.folder).name, storage_path=str(storage), failure_config=FailureConfig(max_failures=retries)),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray Train wraps what a rank raised in errors of its own, one per rank
        if own := _own_error(error):
            raise own from None
        raise WorkerFailure(Failure.PROCESS_LOST, str(error).splitlines()[0]) from None


def _own_error(error: BaseException) -> RaypruneError | None:
    """The stage's error behind Ray Train's."""
    for found in (error, *getattr(error, "worker_failures", {}).values(), getattr(error, "cause", None), error.__cause__):
        cause = getattr(found, "cause", found)
        if isinstance(cause, RaypruneError):
            return cause
    return None


def _rank(config: dict[str, Any]) -> None:
    from workers.finetune import train_rank

    os.environ.setdefault("OMP_NUM_THREADS", str(config["stage"].threads))
    ranks = ray.train.get_context()
    train_rank(config["stage"], ranks.get_world_rank(), ranks.get_world_size(), config["device"])
