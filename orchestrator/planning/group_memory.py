"""Bytes that one coupled group takes: its statistics, and the decision made from them.

Letters: Z a consumer's input, F its width, K kept columns, P pruned columns, D hidden, n tokens
that reach one block of a group, M the smaller of n and K, Q an orthogonal factor, w bytes per
element on disk.
"""

import math
from dataclasses import dataclass

from rayprune.orchestrator.planning.workload import (
    Workload,
    block_tokens,
    factorised_rows,
    in_rows,
    ranked_group,
)
from rayprune.specs.methods.options import Masks
from rayprune.workers.machine.blocks import BLOCK_ROWS
from rayprune.workers.model.description import Group

BLOCKS = 3
"""Blocks of output rows that are held at once: the weight, its change, a product."""


def gram_bytes(load: Workload, group: Group) -> int:
    """The Gram matrix of one block, F^2 8; with drift its product with Z beside it, F D 8."""
    return group.width * (group.width + (load.hidden if load.corrects_drift else 0)) * 8


def statistics_bytes(load: Workload, group: Group) -> int:
    """Training and held-out statistic of one block: two Gram matrices (or R factors); rows, of
    which each is in one, once. Experts are worked on one after the other.
    """
    if in_rows(load, group) and block_tokens(load, group) < group.width:
        return block_tokens(load, group) * group.width * load.element_bytes
    return 2 * gram_bytes(load, group)


def partial_bytes(load: Workload, group: Group) -> int:
    """Statistics of one worker while it collects its shards: a sum for every level of their merge
    tree, or its share of the rows.
    """
    if in_rows(load, group):
        return min(
            math.ceil(statistics_bytes(load, group) * load.share_tokens / load.tokens),
            2 * gram_bytes(load, group),
        )
    return gram_bytes(load, group) * (
        1 + math.ceil(math.log2(math.ceil(load.shards / load.workers)))
    )


def exchanged_bytes(load: Workload, group: Group) -> int:
    """While workers sum their statistics: what one has collected, and a Gram matrix that comes;
    rows are all that there will be.
    """
    if in_rows(load, group):
        return statistics_bytes(load, group)
    return partial_bytes(load, group) + gram_bytes(load, group)


@dataclass(frozen=True)
class Decision:
    """Memory of one factorisation or decision, in bytes: what can lie in files, and what cannot."""

    spillable: int
    plain: int

    def held(self, in_files: bool) -> int:
        """Private memory, with what can lie in files there or not."""
        return self.plain + (0 if in_files else self.spillable)


def r_factor_bytes(load: Workload, group: Group) -> Decision:
    """While collected rows become their R factor: two factors, or one and a micro-batch, a copy
    that QR works on, the new one twice.
    """
    if not load.exact or block_tokens(load, group) < group.width:
        return Decision(0, 0)
    rows = group.width + max(group.width, load.batch_tokens)
    return Decision(8 * rows * group.width, 8 * (rows + 2 * group.width) * group.width)


def decision_bytes(load: Workload, group: Group) -> Decision:
    """The larger of selecting and correcting; the corrected weight D K w lies beside the original,
    on the host.
    """
    if load.masks:
        return _zeros_bytes(load, load.masks, group)
    ranking = Decision(load.ranking.ranking_bytes(ranked_group(load, group)), 0)
    moments = ([ranking] if load.selects else []) + (
        _correction_bytes(load, group) if load.corrects else []
    )
    largest = max(moments, key=lambda moment: moment.spillable + moment.plain)
    result = (
        load.hidden * load.columns(group) * load.written_element_bytes
        if load.corrects and not load.on_gpu
        else 0
    )
    return Decision(largest.spillable, max(moment.plain for moment in moments) + result)


def _correction_bytes(load: Workload, group: Group) -> list[Decision]:
    """Moments of a correction.

    Gram: targets D K 8, of the fit and of the judge, with the pruned part P K 8, then with the
    factor K^2 8 (twice on a GPU).
    Rows: Z_K and its QR, 3 n K 8; then the targets D M 8 with Q (n K 8), and Z_P (n P 8) or the
    damped factor, 6 M^2 8. Besides, blocks of rows.
    """
    kept, rows = load.columns(group), factorised_rows(load, group)
    at_once = min(BLOCK_ROWS[load.device_kind], load.hidden)
    blocks = BLOCKS * 8 * at_once * group.width
    if not in_rows(load, group):
        factor = kept**2 * (2 if load.on_gpu else 1)
        targets = 2 * load.hidden * kept
        return [Decision(8 * (targets + max((group.width - kept) * kept, factor)), blocks)]
    small = min(rows, kept)
    pruned = Decision(
        8 * (load.hidden * small + rows * (group.width - kept)),
        8 * (rows * kept + small**2) + blocks,
    )
    return [
        Decision(8 * rows * kept, 16 * rows * kept),
        pruned,
        Decision(8 * load.hidden * small, 8 * (rows * kept + 7 * small**2) + blocks),
    ]


def _zeros_bytes(load: Workload, masks: Masks, site: Group) -> Decision:
    """Zeros in the matrices of a site, of D outputs together: which weights go, D F; scores and
    their order, 32 for every weight that is looked at together; blocks of rows; the result, D F w.

    With `obs` all weights in fp64, D F 8, and the factor, F^2 8 (three of them on a GPU while it is
    inverted), and where rows are kept the Gram matrix.
    """
    outputs, width = site.unit_parameters, site.width
    at_once = min(BLOCK_ROWS[load.device_kind], outputs)
    whole = masks.group is None and masks.score == "magnitude"
    scored = 32 * width * (outputs if whole else at_once)
    result = 0 if load.on_gpu else site.parameters * load.written_element_bytes
    plain = site.parameters + scored + BLOCKS * 8 * at_once * width + result
    if masks.score != "obs":
        return Decision(0, plain)
    factors = (3 if load.on_gpu else 1) + in_rows(load, site)
    return Decision(8 * (site.parameters + factors * width**2), plain)


def factorisation_bytes(load: Workload, group: Group) -> int:
    """One decision, all of it in memory."""
    return decision_bytes(load, group).held(in_files=False)
