"""How the work is spread over workers, and where these live."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayprune.specs.section import Section


class ParallelSpec(Section):
    """How the work is spread. The result does not depend on `workers`, `transport`, `retries` and
    `step_seconds`.
    """

    workers: int = Field(default=1, ge=1, le=4096)
    """Number of worker processes."""
    placement: Literal["shards", "layers"] = "shards"
    """`shards`: the calibration shards are split over the workers and every layer visits all of
    them; `layers`: every worker has layers of its own, micro-batches flow from one to the next, and
    all decide at the same time. Part of the result.
    """
    propagation: Literal["auto", "pruned", "dense", "refit"] = "auto"
    """Where activations come from; `pruned`: the pruned layers below; `dense`: the dense model;
    `refit`: selections from the dense model, then corrections on the pruned path; `auto`: `pruned`
    for `shards`, `dense` for `layers`. Part of the result.
    """
    transport: Literal["object-store", "collective"] = "object-store"
    """How statistics of the pruned path go from worker to worker; `object-store`: by Ray's;
    `collective`: from memory to memory by `torch.distributed`, with NCCL on GPUs and gloo on CPUs.
    """
    threads_per_worker: int = Field(default=1, ge=1, le=1024)
    """CPU threads of one worker. Part of the result: factorisations round differently with other
    thread counts.
    """
    micro_batch: int = Field(default=4, ge=1, le=4096)
    """Windows that go through a layer together. Part of the result."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where workers compute; `auto`: one GPU per worker when there are enough, else the CPU."""
    retries: int = Field(default=2, ge=0, le=100)
    """How often a layer is tried again after a worker was lost, or hung."""
    step_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | Literal["auto"] = "auto"
    """After how long without any progress (the end of a step, something that a training writes) a
    worker counts as hung and is replaced, in seconds; `auto`: many times what the plan's work
    takes, at least 600.
    """

    @property
    def effective_propagation(self) -> Literal["pruned", "dense", "refit"]:
        """`propagation` with `auto` resolved."""
        if self.propagation == "auto":
            return "pruned" if self.placement == "shards" else "dense"
        return self.propagation

    @model_validator(mode="after")
    def _transport_fits(self) -> Self:
        if self.transport == "collective" and (self.placement != "shards" or self.workers < 2):
            raise ValueError(
                "transport: collective: statistics go between workers with placement: shards and"
                " two workers or more; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _propagation_fits(self) -> Self:
        if (self.placement == "shards") != (self.effective_propagation == "pruned"):
            needed = "layers" if self.placement == "shards" else "shards"
            raise ValueError(f"propagation {self.propagation!r} needs placement: {needed}")
        return self


class ClusterSpec(Section):
    """Where the workers live."""

    executor: Literal["ray", "in-process"] = "ray"
    """`ray`: one Ray actor per worker; `in-process`: all work in the driver's process."""
    address: str = Field(default="local", min_length=1)
    """`local`: a private Ray on this machine; else the address of a Ray cluster, or `auto` for the
    one this runs in.
    """
    connect_seconds: int = Field(default=20, ge=1, le=86_400)
    """How long a cluster may take to answer at its address, in seconds."""
    start_seconds: int = Field(default=300, ge=1, le=86_400)
    """How long a private Ray, and then the workers, may take to start, in seconds."""
    wait_seconds: int = Field(default=0, ge=0, le=86_400)
    """How long a run waits, in seconds, for an autoscaler to bring missing CPUs and GPUs; 0: it
    stops at once.
    """
