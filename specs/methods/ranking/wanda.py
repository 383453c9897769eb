"""Options of Wanda's score for structures."""

from typing import Literal

from rayprune.specs.methods.options import MethodOptions


class WandaOptions(MethodOptions):
    """Wanda's score for structures (arXiv 2306.11695, Wanda-sp): norm of a channel times the
    weights that read it. A baseline.
    """

    name: Literal["wanda"] = "wanda"
