"""Options of the method that removes nothing."""

from typing import Literal

from rayprune.specs.methods.options import MethodOptions


class NoneOptions(MethodOptions):
    """Nothing is removed: the model as it is goes through `recover` and `evaluation`. The control
    of a job that prunes and recovers.
    """

    name: Literal["none"] = "none"

    @property
    def removes_nothing(self) -> bool:
        """It is the method that does."""
        return True
