"""The pruning methods of a job: one class of options per method, told apart by `name`.

A method that ranks units is found by its file in `ranking/`; those that train before they cut, cut
in steps, cut no units, or nothing at all are listed here.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

from rayprune.specs.methods.dress import DressOptions
from rayprune.specs.methods.none import NoneOptions
from rayprune.specs.methods.options import MethodOptions
from rayprune.specs.methods.progressive import ProgressiveOptions
from rayprune.specs.methods.ranking import RANKINGS
from rayprune.specs.methods.sparse import SparseOptions
from rayprune.specs.methods.trsp import TrspOptions
from rayprune.specs.section import one_of

METHODS: Mapping[str, type[MethodOptions]] = RANKINGS | {
    "dress": DressOptions,
    "trsp": TrspOptions,
    "progressive": ProgressiveOptions,
    "sparse": SparseOptions,
    "none": NoneOptions,
}
"""The options of every method, by its name."""

if TYPE_CHECKING:
    MethodSpec: TypeAlias = MethodOptions
else:
    MethodSpec = one_of(METHODS, "stat")
