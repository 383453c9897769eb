"""Values with the place that they were read from."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Located:
    """A value, the place to name in an error, and the folder its relative paths start from."""

    value: Any
    where: str
    folder: str

    def child(self, key: str | int) -> "Located | None":
        """The value under a key, or None."""
        if isinstance(self.value, list):
            return self.value[key] if isinstance(key, int) and key < len(self.value) else None
        return self.value.get(key) if isinstance(self.value, dict) else None

    def plain(self) -> Any:
        """The value without the places."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return [item.plain() for item in self.value] if isinstance(self.value, list) else self.value


def shown(value: object) -> str:
    """A value as YAML would have it on one line, shortened."""
    text = json.dumps(value, ensure_ascii=isinstance(value, str) and not value.isprintable())
    return text if len(text) <= 80 else text[:77] + "..."
