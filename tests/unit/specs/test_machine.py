"""Machine profiles: built-in, written, read, refused."""

from pathlib import Path

import pytest

from rayprune.specs.errors import SpecError
from rayprune.specs.machine import PROFILES, load_profile, profile_text


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_survive_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text(profile_text(PROFILES[name]))
    assert load_profile(str(path)) == PROFILES[name] == load_profile(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file, and not one of h200-141gb, h100-80gb"),
        ("name: x", "machine.yaml:1: device: is required; add it"),
        ("[1]", "machine.yaml:1: must be a section of fields"),
        ("{", "machine.yaml:1:2: not valid YAML"),
        ("name: x\nname: y\n", 'machine.yaml:2: duplicate key "name", first given'),
        ("&a [" + "*a," * 20 + "*a]", "more than 32 levels or 10000 values"),
        (profile_text(PROFILES["l40s"]) + "speed: 3\n", r"machine.yaml:\d+: speed: unknown field"),
        (
            profile_text(PROFILES["l40s"]).replace("device: cuda", "device: tpu"),
            'machine.yaml:2: device: must be one of "cpu", "cuda" .got "tpu"',
        ),
    ],
)
def test_unusable_profiles_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpecError, match=message):
        load_profile(str(path))
