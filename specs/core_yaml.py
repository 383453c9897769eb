"""YAML with the scalars of the YAML 1.2 core schema: `1e-3` is a number, `no` is a text."""

import re
from typing import Any

import yaml

MAX_ALIASES = 100
MAX_DEPTH = 32

TAG = "tag:yaml.org,2002:"
CORE_SCHEMA = {
    TAG + "null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    TAG + "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    TAG + "int": re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    TAG + "float": re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}
NUMBER_TAGS = (TAG + "int", TAG + "float")


class CoreLoader(yaml.SafeLoader):
    """Composes one YAML document with the scalars of the YAML 1.2 core schema, within bounds."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._aliases = 0
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node within the bounds on aliases and depth."""
        # the stubs leave it out
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        self._aliases += self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._aliases > MAX_ALIASES:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_ALIASES} aliases", mark)
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"nested deeper than {MAX_DEPTH} levels", mark
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class CoreDumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or YAML 1.2 would read as something else."""


# The key None stands for scalars with any first character.
CoreLoader.yaml_implicit_resolvers = {None: list(CORE_SCHEMA.items())}
CoreDumper.yaml_implicit_resolvers = {
    **yaml.SafeDumper.yaml_implicit_resolvers,
    None: list(CORE_SCHEMA.items()),
}
