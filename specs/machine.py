"""Machine profiles: the rates from which a plan takes its times.

Built-in profiles are data-sheet peaks times what dense code usually reaches: 50% for products in
the forward type, 70% for fp32 and fp64 products, 80% of memory bandwidth. Disk (2 GB/s) and network
(12.5 GB/s, 1 GB/s for `cpu-core`) are assumed, not looked up. `rayprune profile` measures a
machine; its numbers are taken as they are.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field

from rayprune.specs.errors import SpecError
from rayprune.specs.section import Section, load_section
from rayprune.specs.sizes import ByteSize

FORWARD_EFFICIENCY, WIDE_EFFICIENCY, BANDWIDTH_EFFICIENCY = 0.5, 0.7, 0.8
Rate = Annotated[float, Field(gt=0)]


class MachineProfile(Section):
    """What one worker's device does in a second, and how much it holds."""

    name: str = Field(min_length=1)
    """What the machine is called in plans."""
    device: Literal["cpu", "cuda"]
    """Where a worker computes."""
    forward_flops: Rate
    """Products in the type of the forward passes (bf16 on a GPU, fp32 on a CPU), in FLOP/s."""
    fp32_flops: Rate
    """fp32 products, in FLOP/s."""
    fp64_flops: Rate
    """fp64 products, in FLOP/s."""
    memory_bandwidth: Rate
    """Memory traffic, in bytes/s."""
    disk_bandwidth: Rate
    """Files, read or written, in bytes/s."""
    network_bandwidth: Rate
    """From worker to worker, in bytes/s."""
    memory_bytes: ByteSize
    """Memory of one worker: of its GPU, or its share of the machine's."""


def _gpu(
    name: str, bf16: float, fp32: float, fp64: float, bandwidth: float, memory_gib: float
) -> MachineProfile:
    """A profile from data-sheet peaks: dense TFLOP/s, TB/s, and GiB that a process can use."""
    return MachineProfile(
        name=name,
        device="cuda",
        forward_flops=bf16 * 1e12 * FORWARD_EFFICIENCY,
        fp32_flops=fp32 * 1e12 * WIDE_EFFICIENCY,
        fp64_flops=fp64 * 1e12 * WIDE_EFFICIENCY,
        memory_bandwidth=bandwidth * 1e12 * BANDWIDTH_EFFICIENCY,
        disk_bandwidth=2e9,
        network_bandwidth=12.5e9,
        memory_bytes=int(memory_gib * 2**30),
    )


_CORE = MachineProfile(
    name="cpu-core",
    device="cpu",
    forward_flops=50e9,
    fp32_flops=50e9,
    fp64_flops=25e9,
    memory_bandwidth=8e9,
    disk_bandwidth=0.5e9,
    network_bandwidth=1e9,
    memory_bytes=4 * 2**30,
)

PROFILES: Mapping[str, MachineProfile] = {
    profile.name: profile
    for profile in (
        _gpu("h200-141gb", 989, 67, 67, 4.8, 139),
        _gpu("h100-80gb", 989, 67, 67, 3.35, 79),
        _gpu("a100-80gb", 312, 19.5, 19.5, 2.04, 79),
        _gpu("l40s", 362, 91.6, 1.43, 0.864, 44),
        _CORE,
    )
}


def load_profile(name: str) -> MachineProfile:
    """A built-in profile by its name, or one from a YAML file.

    Raises:
        SpecError: neither, or the file describes no profile.
    """
    if name in PROFILES:
        return PROFILES[name]
    if not (path := Path(name)).exists():
        raise SpecError(f"--profile {name}: no such file, and not one of {', '.join(PROFILES)}")
    return load_section(MachineProfile, path, "a machine profile")


def profile_text(profile: MachineProfile) -> str:
    """A profile as YAML that `load_profile` reads."""
    text: str = yaml.safe_dump(profile.model_dump(), sort_keys=False)
    return text
