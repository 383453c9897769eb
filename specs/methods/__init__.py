"""The pruning methods of a job: one class of options per method, told apart by `name`.

A method that ranks units is found by its file in `ranking/`; methods that train before they cut are
listed here.
"""

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Tag

from rayprune.specs.methods.dress import DressOptions
from rayprune.specs.methods.options import MethodOptions
from rayprune.specs.methods.ranking import RANKINGS
from rayprune.specs.methods.trsp import TrspOptions
from rayprune.specs.section import named, told_apart_by_name

METHODS: Mapping[str, type[MethodOptions]] = RANKINGS | {"dress": DressOptions, "trsp": TrspOptions}
"""The options of every method, by its name."""

if TYPE_CHECKING:
    MethodSpec: TypeAlias = MethodOptions
else:
    _Options = Annotated[
        reduce(or_, [Annotated[options, Tag(name)] for name, options in METHODS.items()]),
        told_apart_by_name("stat"),
    ]
    MethodSpec = Annotated[
        _Options, BeforeValidator(named, json_schema_input_type=Literal[tuple(METHODS)] | _Options)
    ]
