"""What could stay of a layer, for the budget to be spread: error curves, and the cuts for some
numbers of units.

Letters: D hidden, F width of a consumer's input, K kept columns.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rayprune.specs.job import CorrectionSpec
from rayprune.specs.methods.options import MethodOptions
from rayprune.workers.model.description import Group
from rayprune.workers.network.slicing import Cut
from rayprune.workers.numerics.correction import corrected, error_curve
from rayprune.workers.numerics.linalg import column_norms, unit_rows
from rayprune.workers.numerics.methods import rank
from rayprune.workers.numerics.statistics import Statistic
from rayprune.workers.passes.stream import Fits
from rayprune.workers.passes.sweep import Sweep

How = tuple[MethodOptions, CorrectionSpec]
"""The method that ranks units, and how the weight that reads them is corrected."""


class DensePath(Sweep):
    """Calibration shards on their way through the dense model: no layer of it is finished, and
    nothing is saved.
    """

    def _finished_cuts(self, layer: int) -> dict[str, Cut]:
        del layer
        return {}

    def _hidden_path(self, shard: int, layer: int) -> Path | None:
        del shard, layer
        return None


@dataclass(frozen=True)
class Curve:
    """Squared relative held-out error by number of units that stay, and cuts for some of these
    numbers.
    """

    errors: dict[int, float]
    cuts: dict[int, Cut]


@torch.inference_mode()
def curve(
    how: How,
    fits: Fits,
    weight_DF: Tensor,
    group: Group,
    ranked_by: Tensor,
    counts: Sequence[int],
    stored: Collection[int],
    dtype: torch.dtype,
) -> Curve:
    """Rank a group's units once, by `ranked_by` (D, F) or (1, F), then correct for each of
    `counts`; cuts for those in `stored`.

    Both statistics are consumed.

    Of no units the whole output is lost. Cost: one ranking, and a correction for each count with
    one damping.
    """
    (method, correction), (training, held_out) = how, fits
    some = sorted(count for count in counts if 0 < count < group.num_units)
    errors, cuts = (
        {group.num_units: 0.0, 0: 1.0},
        {0: Cut(group.name, torch.arange(0), weight_DF[:, :0])},
    )
    if some:
        order = rank(method, training, ranked_by, group.columns, range(some[0], some[-1] + 1))
        units = {count: order[:count].sort().values for count in some}
        columns = {
            count: unit_rows(kept, group.columns).to(_device(training))
            for count, kept in units.items()
        }
        damping, found = error_curve(
            training, held_out, weight_DF, list(columns.values()), correction
        )
        errors |= dict(zip(some, found, strict=True))
        whole = training.merge(held_out)
        for count in set(some) & set(stored):
            cuts[count] = Cut(
                group.name,
                units[count],
                corrected(whole, weight_DF, columns[count], damping, dtype),
            )
    return Curve(
        {count: errors[count] for count in counts}, {count: cuts[count] for count in stored}
    )


def plain_cut(name: str, num_kept: int, weight_DF: Tensor, dtype: torch.dtype) -> Cut:
    """Of an expert that no token has reached: the units with the largest columns, as they are."""
    order = torch.argsort(column_norms(weight_DF), descending=True, stable=True)
    units = order[:num_kept].sort().values
    return Cut(name, units.cpu(), weight_DF[:, units].to(dtype).contiguous())


def plain_curve(
    weight_DF: Tensor,
    group: Group,
    counts: Sequence[int],
    stored: Collection[int],
    dtype: torch.dtype,
) -> Curve:
    """The same of such an expert: what is lost of the columns' squares."""
    kept_F = column_norms(weight_DF).square().sort(descending=True).values.cumsum(0)
    whole = float(kept_F[-1]) or 1.0  # nothing of nothing is lost
    errors = {count: (float(kept_F[-1]) - float(kept_F[count - 1])) / whole for count in counts}
    cuts = {count: plain_cut(group.name, count, weight_DF, dtype) for count in stored}
    return Curve(errors, cuts)


def _device(statistic: Statistic) -> torch.device:
    return statistic.column_energy.device


def tensors_of(cuts: dict[int, Cut]) -> dict[str, Tensor]:
    """Cuts as they lie in a file."""
    tensors: dict[str, Tensor] = {}
    for count, cut in cuts.items():
        tensors |= {
            f"{cut.group}.{count}.units": cut.units,
            f"{cut.group}.{count}.weight": cut.weight_DK.contiguous(),
        }
    return tensors


def stored_cut(file: Path, group: str, count: int) -> Cut:
    """The cut for so many units, from a file of a layer's survey, from which its weight is
    mapped.
    """
    with safe_open(file, framework="pt") as handle:
        return Cut(
            group,
            handle.get_tensor(f"{group}.{count}.units"),
            handle.get_tensor(f"{group}.{count}.weight"),
        )
