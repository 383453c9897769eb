"""What could stay of a layer, for the budget to be spread: error curves, and the cuts for some
numbers of units.

Letters: D hidden, F width of a consumer's input, K kept columns.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor

from rayprune.specs.job import JobSpec
from rayprune.workers.model.description import Group
from rayprune.workers.network.slicing import Cut
from rayprune.workers.numerics.correction import corrected, error_curve
from rayprune.workers.numerics.linalg import unit_rows
from rayprune.workers.numerics.methods import rank
from rayprune.workers.numerics.statistics import Statistic
from rayprune.workers.passes.stream import Fits
from rayprune.workers.store.layout import SURVEY_FILE, Scope, survey_task


@dataclass(frozen=True)
class Curve:
    """Squared relative held-out error by number of units that stay, and cuts for some of these
    numbers.
    """

    errors: dict[int, float]
    cuts: dict[int, Cut]


@torch.inference_mode()
def curve(
    job: JobSpec,
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
    training, held_out = fits
    some = sorted(count for count in counts if 0 < count < group.num_units)
    errors, cuts = (
        {group.num_units: 0.0, 0: 1.0},
        {0: Cut(group.name, torch.arange(0), weight_DF[:, :0])},
    )
    if some:
        order = rank(job.method, training, ranked_by, group.columns, range(some[0], some[-1] + 1))
        units = {count: order[:count].sort().values for count in some}
        columns = {
            count: unit_rows(kept, group.columns).to(_device(training))
            for count, kept in units.items()
        }
        damping, found = error_curve(
            training, held_out, weight_DF, list(columns.values()), job.correction
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


def stored_cut(scope: Scope, layer: int, group: str, count: int) -> Cut:
    """The cut for so many units, from the layer's survey; its weight is mapped from the file."""
    with safe_open(scope.folder(survey_task(layer)) / SURVEY_FILE, framework="pt") as handle:
        return Cut(
            group,
            handle.get_tensor(f"{group}.{count}.units"),
            handle.get_tensor(f"{group}.{count}.weight"),
        )
