"""What can be cut of every family, how the rest is written, and what reads it: from the families'
files, over the configs of the tiny models that the contract builds.

`python -m tests.contracts.families_page` writes docs/families.md and the table in README.md.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from rayprune.specs.errors import SpecError
from rayprune.workers.model import deci_lm, ggml
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Group, Model
from rayprune.workers.model.families import family_named, model_types
from rayprune.workers.model.older import why_not_by_4
from tests.models import raw_config

ROOT = Path(__file__).parents[2]
PAGE, README = ROOT / "docs" / "families.md", ROOT / "README.md"
BETWEEN = (
    "<!-- families: written by tests/contracts/families_page.py -->",
    "<!-- families end -->",
)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
"""Those of the contract: of three KV groups the six heads do not divide the hidden size."""
ALL_STAY = "all stay"
WITH_CLASS = "`per_layer`"


@dataclass(frozen=True)
class Row:
    """A family in the words of the table."""

    model_type: str
    file: str
    kind: str
    heads: str
    ffn: str
    experts: str
    layers: str
    sizes: str
    older: str
    vllm: str
    gguf: str
    reasons: tuple[str, ...]

    @property
    def short(self) -> tuple[str, ...]:
        """What it has in common with others in the short table."""
        return (self.kind, self.heads, self.ffn, self.experts, self.layers)


def rows() -> list[Row]:
    """All families, by name."""
    return [_row(name) for name in model_types()]


def _row(name: str) -> Row:
    config = Config(raw_config(name, **SIZES))
    file = f"[`{name}`](../workers/model/families/{name}.py)"
    model = family_named(name).of(config).describe(config)
    groups = {group.name: group for group in model.groups}
    checkpoint = Checkpoint(Path(), model, config, {}, "", has_weights=False)
    attention = next(group for group in model.groups if group.kind == "attention")
    given = [group for group in model.groups if group.fixed or group.stock]
    stay = {"first": model.first_stays, "last": model.last_stays}
    return Row(
        model_type=config.model_type,
        file=file,
        kind=_kind(model),
        heads=_heads(checkpoint, attention),
        ffn=ALL_STAY if groups["neurons"].fixed else "any width",
        experts="yes" if model.experts else "-",
        layers=", but the ".join(["yes", *(which for which, reason in stay.items() if reason)]),
        sizes=_sizes(model, attention),
        older="no" if why_not_by_4(config.raw) else "yes",
        vllm="also of different sizes" if config.model_type in deci_lm.TYPES else "not tried",
        gguf="`export.target`" if config.model_type in ggml.TYPES else "not written here",
        reasons=tuple(f"{g.title}: {g.fixed or g.stock}" for g in given)
        + tuple(f"{which} layer: {reason}" for which, reason in stay.items() if reason),
    )


def _kind(model: Model) -> str:
    if model.beside:
        return "decoder in a larger model"
    if model.experts:
        return "mixture"
    return "decoder" if model.causal else "encoder"


def _heads(checkpoint: Checkpoint, group: Group) -> str:
    """For which numbers of units there is a form, and of which type."""
    if group.fixed:
        return ALL_STAY
    if group.stock:
        return f"{WITH_CLASS} alone"
    own, others, refused = [], set[str](), False
    for kept in range(group.num_units - 1, 0, -1):
        units = checkpoint.model.units | {group.name: kept}
        layers = [units] * checkpoint.num_layers
        try:
            written = checkpoint.written(range(len(layers)), layers, "transformers", "auto")
        except SpecError:
            refused = True
            continue
        if written.model_type == checkpoint.model.model_type:
            own.append(kept)
        else:
            others.add(written.model_type)
    if refused:
        return "divisors of the hidden size"
    as_others = f"as {', '.join(f'`{name}`' for name in sorted(others))}"
    if own and others:
        return f"any number; if no divisor {as_others}"
    return f"any number, {as_others}" if others else "any number"


def _sizes(model: Model, attention: Group) -> str:
    """Layers of different sizes."""
    if model.experts:
        return "no" if model.sized_alike else "remote class"
    ffn = next(group for group in model.groups if group.kind == "ffn")
    if ffn.fixed and attention.fixed:
        return "no"
    if model.sized_alike:
        return "padded"
    return "remote class, padded"


PAGE_TOP = """\
# Families

What can be cut of every model type, how the rest is written, and what reads it. This page is
written by `python -m tests.contracts.families_page` from the families' files; a test keeps it
current. `rayprune inspect MODEL` says the same of a folder with its own sizes; an unknown type is
[one file](adding-a-family.md).

{count} model types can be pruned. **Tested** is, of each, on a tiny random model in float32 on the
CPU (`tests/contracts/test_families.py`, `test_experts.py`): layers one by one give the whole model
bit for bit; whatever a cell says can go is cut, exported, loaded again by the class that
`architectures` names, or by the remote class, with no tensor missing or left over, and gives the
logits of the dense model with the same units masked; decoders generate the same with and without a
cache; STAT at 0% is the identity; what stays is refused by name.

**Not tested**: published weights, but for SmolLM2's (`llama`), MiniLM's (`bert`) and Gemma 3
270M's (`gemma3_text`); any type in vLLM (the forms follow its source); llama.cpp, but for `llama`;
transformers 4.57, but for once by hand ([engines](engines.md#transformers)).

- **heads**: KV groups with their query heads, of encoders heads: which numbers may stay. `as`
  another type: the same computation under another name. `per_layer` alone: with
  `budget.per_layer`, in a remote class, or padded with `export.pad`.
- **FFN**: widths of FFN channels, in mixtures of the experts' too (multiples of 8).
- **experts**: whether whole experts can go (`budget.experts`).
- **layers**: whether whole layers can go (`budget.drop_layers`).
- **different sizes**: whether layers may keep different numbers of units (`budget.per_layer`): in a
  remote class beside the folder (`trust_remote_code=True`), or padded with zeros for stock classes;
  of mixtures experts and their widths too.
- **4.57**: whether transformers 4.57 knows the type and all that its config says.
- **vLLM**: which have a form (`DeciLM`) for layers of different sizes; where layers are alike, the
  folder is the ordinary one of its type.
- **GGUF**: for which `export.target: gguf` writes a file; other folders are ordinary ones, for
  llama.cpp's converter where it knows the type.

`gemma4_text` and `gemma4` are mixtures where the config says `enable_moe_block`, and tested as
such; also with per-layer inputs (`hidden_size_per_layer_input`), and with layers that read keys and
values of others (`num_kv_shared_layers`) and FFNs that are twice as wide there, as of E2B and E4B.
A layer goes with its part of the tables of inputs; one whose keys and values are read stays. With
inputs no layer is trained by itself (`scope: layer`), with layers that read those of others there
is no `method.scale: gradients`. `method: sparse` is refused where matrices differ between layers.

`llama4`: in transformers 5.24.0 the forward pass of `Llama4ForConditionalGeneration` fails on the
dense model as on the pruned one (it asks its text model for `image_outputs`); 5.23.0 computes.
Either loads it, and what is tested, measured, and writes text is the model's `language_model`.

`chameleon`: its class gives pictures' tokens no probability, so that it is judged on text alone;
the 34B (`swin_norm`) is refused. `janus` writes pictures by a head of its own, which goes along and
is not judged.

On 28 November 2026 the newest transformers was 5.24.0, which the contract runs with; with 5.23.0
all of it passes, too.

"""


def page() -> str:
    """docs/families.md."""
    found = rows()
    count = sum(row.kind != "planned only" for row in found)
    parts = [PAGE_TOP.format(count=count)]
    parts.append(
        "| model type | file | kind | heads | FFN | experts | layers | different sizes | 4.57 |"
        " vLLM | GGUF |\n" + "|---" * 11 + "|\n"
    )
    for row in found:
        cells = (f"`{row.model_type}`", row.file, row.kind, row.heads, row.ffn, row.experts)
        more = (row.layers, row.sizes, row.older, row.vllm, row.gguf)
        parts.append(f"| {' | '.join((*cells, *more))} |\n")
    parts.append("\n## Why some stay\n\n| why | model types |\n|---|---|\n")
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in found:
        for reason in row.reasons:
            reasons[reason].append(f"`{row.model_type}`")
    parts += [f"| {reason} | {', '.join(types)} |\n" for reason, types in reasons.items()]
    return "".join(parts)


def readme() -> str:
    """The short table: types that have all in common are one row."""
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in rows():
        alike[row.short].append(f"`{row.model_type}`")
    lines = ["| `model_type` | kind | heads | FFN | experts | layers |", "|---" * 6 + "|"]
    ordered = sorted(alike.items(), key=lambda item: (item[0][0], -len(item[1]), item[1]))
    lines += [f"| {', '.join(types)} | {' | '.join(cells)} |" for cells, types in ordered]
    return "\n".join(lines)


def with_table(text: str, table: str) -> str:
    """A document with the table between its marks."""
    start, end = map(re.escape, BETWEEN)
    found, count = re.subn(
        f"({start}\n).*?(\n{end})", lambda match: match[1] + table + match[2], text, flags=re.DOTALL
    )
    assert count == 1, "README.md has no marks for the table of families"
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), readme()), encoding="utf-8")
