"""The rows of `benchmarks.quality`: settings of the demo's job, and the sparsities they are run
at.
"""

import json
from dataclasses import dataclass

ALL = (0.2, 0.3, 0.4)
LARGE = (0.4, 0.5)
"""Where several steps may be worth their time."""


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    settings: tuple[str, ...]
    sparsities: tuple[float, ...] = ALL


ALIKE = ("budget.kv_groups=3", "budget.round_to=2")
"""One width for all layers, to the channel."""
PER_LAYER = ("budget.per_layer=true", "budget.round_to=16")
THRESHOLD = (*PER_LAYER, "budget.allocation=threshold")
UNCORRECTED = ("correction.damping=1e6",)
DRIFT = ("correction.drift=0.5",)
STEPS = (*ALIKE, "method=progressive")
GRADIENTS = ("method.scale=gradients",)
MORE_GRADIENTS = (*GRADIENTS, "method.gradient_samples=128")
ALL_WINDOWS = 392
"""All of the first 80% of WikiText-2's validation text, but for a rest."""
OWN = "OWN_TEXT"
"""Stands for the file of what the model has written itself: `rayprune generate`, going on from the
calibration text.
"""
GIVEN = "GIVEN_TEXT"
"""Stands for the file of the calibration text."""
GIVEN_WINDOWS = 63
OWN_WINDOWS = 3 * GIVEN_WINDOWS


def own_text(windows: int) -> tuple[str, str]:
    """So many windows of the text, and the model's own beside them."""
    return (
        f"calibration.samples={windows + OWN_WINDOWS}",
        f"calibration.mix=[{{path: {OWN}, weight: {OWN_WINDOWS / windows}}}]",
    )


OWN_TEXT = own_text(GIVEN_WINDOWS)


def training(windows: int, used: int = 0, **options: object) -> str:
    """Options of a training on so many windows, over and over until so many have been `used`;
    without that, once.
    """
    steps = {
        "samples": windows,
        "epochs": (used or windows) / windows,
        "batch": 4,
        "micro_batch": 2,
        "dtype": "bfloat16",
    }
    return json.dumps(steps | {"learning_rate": 3e-4, "checkpoint_steps": 1000} | options)


TRAINED_WINDOWS = ALL_WINDOWS // 2
TRAINING = training(TRAINED_WINDOWS)
RANDOM = (*ALIKE, "method.name=dress")
UNTRAINED = (
    *RANDOM,
    "method.strength=1e-30",
    "method.training={samples: 1, learning_rate: 1.0e-30}",
)
DRESS = (*RANDOM, f"method.training={TRAINING}")
GATED = ("method.name=trsp", "method.gate_strength=0.1")
TRSP = (
    *GATED,
    f"method.gates={training(24, batch=1, micro_batch=1, learning_rate=0.05)}",
    f"method.training={TRAINING}",
)
TEACHES_ITSELF = "method.loss=distillation"
RECOVER = (f"recover={training(TRAINED_WINDOWS, loss='lm')}",)
FAST = {"micro_batch": 4, "activation_checkpointing": False}
"""On a GPU, where it is operations that take time, not memory."""
THOUSAND = training(ALL_WINDOWS, 1000, **FAST)
"""1000 windows of 512 tokens, as DReSS takes."""
LONG_WINDOWS = 98
"""All of that text in windows of 2048 tokens."""
LONG = (f"calibration.samples={LONG_WINDOWS}", "calibration.sequence_length=2048")
PAPERS_GATES, PAPERS_UPDATES = (
    training(LONG_WINDOWS, 128, **FAST, learning_rate=0.05),
    training(LONG_WINDOWS, 128, **FAST, batch=2),
)
"""128 windows of 2048 tokens, as TRSP takes."""
PAPERS_TRSP = (*GATED, *LONG, f"method.gates={PAPERS_GATES}", f"method.training={PAPERS_UPDATES}")

PAPERS_DRESS, OF_STAT, BY_THOUSAND = (
    (*RANDOM, f"method.training={THOUSAND}"),
    ("method.mask=stat",),
    (f"recover={training(ALL_WINDOWS, 1000, **FAST, loss='lm')}",),
)

_PAPERS = {
    "dress, 1000 windows": PAPERS_DRESS,
    "dress, mask of stat, 1000 windows": (*PAPERS_DRESS, *OF_STAT),
    "trsp, 128 x 2048 tokens": PAPERS_TRSP,
    "stat, recovered by 1000 windows": (*ALIKE, *BY_THOUSAND),
    "numerical, threshold (Numerical Pruning), recovered by 1000 windows": (
        *THRESHOLD,
        "method=numerical",
        *BY_THOUSAND,
    ),
    "dress, 1000 windows, recovered": (*PAPERS_DRESS, *BY_THOUSAND),
    "dress, mask of stat, 1000 windows, recovered": (*PAPERS_DRESS, *OF_STAT, *BY_THOUSAND),
    "trsp, 128 x 2048 tokens, recovered": (
        *PAPERS_TRSP,
        f"recover={training(LONG_WINDOWS, 250, **FAST, loss='lm')}",
    ),
}
"""Training with as many windows as the papers; a GPU's work."""

SHORT = 128
"""Tokens of the windows that are distilled on."""


def distilled(steps: int, **options: object) -> str:
    """Recovery of adapters from the dense model, on the calibration text and the model's own, half
    and half, in so many steps of 8 short windows; the best state on windows held out.
    """
    windows = 2 * GIVEN_WINDOWS * 512 // SHORT
    recover = {
        "text": {
            "path": GIVEN,
            "mix": [{"path": OWN}],
            "samples": windows,
            "sequence_length": SHORT,
        },
        "epochs": 8 * steps / (windows - 16),
        "batch": 8,
        "micro_batch": 4,
        "lora": {},
        "held_out": {"windows": 8, "every": 8},
        "checkpoint_steps": 1000,
    }
    return f"recover={json.dumps(recover | options)}"


DISTILLED = (distilled(48),)
TAUGHT = (distilled(48, teacher_top=64),)
LONGER = (distilled(192, teacher_top=64),)
_DISTILLED = {
    "stat by gradients, drift, own text, distilled": (
        *ALIKE,
        *DRIFT,
        *GRADIENTS,
        *OWN_TEXT,
        *DISTILLED,
    ),
    "stat by gradients, drift, curves, own text, distilled": (
        *PER_LAYER,
        *DRIFT,
        *GRADIENTS,
        *OWN_TEXT,
        *DISTILLED,
    ),
    "stat by gradients, drift, curves, own text, distilled in 192 steps from 64 tokens": (
        *PER_LAYER,
        *DRIFT,
        *GRADIENTS,
        *OWN_TEXT,
        *LONGER,
    ),
}
"""Recovered by distillation."""
_CONTROLS = {
    "nothing removed, distilled": DISTILLED,
    "nothing removed, distilled from 64 tokens": TAUGHT,
    "nothing removed, next-token loss": RECOVER,
}
"""The dense model trained likewise."""

_ABLATIONS = {
    "obs, drift": (*ALIKE, *DRIFT, "method=obs"),
    "flap": (*ALIKE, "method=flap"),
    "numerical": (*ALIKE, "method=numerical"),
    "stat by gradients": (*ALIKE, *GRADIENTS),
    "stat, shrinkage 0.5": (*ALIKE, "method.shrinkage=0.5"),
    "stat, uncorrected": (*ALIKE, *UNCORRECTED),
    "stat, damping 1e-4": (*ALIKE, "correction.damping=1e-4"),
    "stat, damping up to 0.3": (*ALIKE, "correction.candidates=[1e-3, 1e-2, 3e-2, 0.1, 0.3]"),
    "stat, dense path": (*ALIKE, "parallel.placement=layers"),
    "stat, 16 x 512 tokens": (*ALIKE, "calibration.samples=16"),
    "stat, 160 x 512 tokens": (*ALIKE, "calibration.samples=160"),
    "stat, drift, search": (*PER_LAYER, *DRIFT, "budget.allocation=search"),
    "random mask": UNTRAINED,
    "random mask, uncorrected": (*UNTRAINED, *UNCORRECTED),
    "dress, uncorrected": (*DRESS, *UNCORRECTED),
    "dress, strength 1.5": (*DRESS, "method.strength=1.5"),
    "dress, without penalty": (*DRESS, "method.strength=1e-30"),
    **{
        f"dress, mask of {name}": (*DRESS, f"method.mask={name}")
        for name in ("stat", "numerical", "obs", "flap", "wanda")
    },
    "dress, distilled": (*DRESS, TEACHES_ITSELF),
    "dress, mask of flap, distilled": (*DRESS, "method.mask=flap", TEACHES_ITSELF),
    "trsp, distilled": (*TRSP, TEACHES_ITSELF),
    "dress, layer by layer": (
        *DRESS,
        "method.scope=layer",
        f"calibration.samples={TRAINED_WINDOWS}",
    ),
}
"""What one thing changes."""

ROWS = {
    "stat, drift, curves": Row((*PER_LAYER, *DRIFT)),
    "stat by gradients, drift, curves": Row((*PER_LAYER, *DRIFT, *GRADIENTS)),
    "stat by gradients, drift": Row((*ALIKE, *DRIFT, *GRADIENTS)),
    "stat, drift": Row((*ALIKE, *DRIFT), (*ALL, 0.5)),
    "stat": Row(ALIKE, (*ALL, 0.5)),
    "numerical, threshold (Numerical Pruning)": Row((*THRESHOLD, "method=numerical")),
    "flap, threshold, uncorrected (FLAP without its bias)": Row(
        (*THRESHOLD, *UNCORRECTED, "budget.kv_groups=3", "method=flap")
    ),
    "wanda, uncorrected (Wanda-sp)": Row((*ALIKE, *UNCORRECTED, "method=wanda")),
    "obs": Row((*ALIKE, "method=obs")),
    "composite": Row((*ALIKE, "method=composite"), LARGE),
    "progressive, 4 linear steps": Row((*STEPS, "method.schedule=linear"), LARGE),
    "progressive, 3 cubic steps": Row((*STEPS, "method.steps=3"), LARGE),
    "progressive, 4 linear steps, drift": Row((*STEPS, "method.schedule=linear", *DRIFT), LARGE),
    "progressive, 4 linear steps, composite": Row(
        (*STEPS, "method.schedule=linear", "method.inner=composite"), LARGE
    ),
    "dress": Row(DRESS, (0.2, 0.3)),
    "trsp": Row(TRSP, (0.2, 0.3)),
    "stat, drift, all tokens": Row(
        (*ALIKE, *DRIFT, f"calibration.samples={ALL_WINDOWS}"), (0.2, 0.3)
    ),
    "stat by gradients, drift, all tokens": Row(
        (*ALIKE, *DRIFT, *GRADIENTS, f"calibration.samples={ALL_WINDOWS}"), (0.2, 0.3)
    ),
    "stat by gradients, drift, all tokens, own text": Row(
        (*ALIKE, *DRIFT, *MORE_GRADIENTS, *own_text(ALL_WINDOWS)), (0.2, 0.3)
    ),
    "stat by gradients, drift, own text": Row(
        (*ALIKE, *DRIFT, *MORE_GRADIENTS, *OWN_TEXT), (0.2, 0.3)
    ),
    "stat, drift, own text": Row((*ALIKE, *DRIFT, *OWN_TEXT), (0.2, 0.3)),
    "stat by gradients, drift, curves, own text": Row(
        (*PER_LAYER, *DRIFT, *MORE_GRADIENTS, *OWN_TEXT), (0.2, 0.3)
    ),
    **{name: Row(settings, (0.2,)) for name, settings in _ABLATIONS.items()},
    **{name: Row(settings, (0.2, 0.3)) for name, settings in _PAPERS.items()},
    **{name: Row(settings, (0.2, 0.3)) for name, settings in _DISTILLED.items()},
    **{
        name: Row(("method=none", "budget={}", *settings), (0.2,))
        for name, settings in _CONTROLS.items()
    },
    "stat, recovered": Row((*ALIKE, *RECOVER), (0.3,)),
    "numerical, threshold (Numerical Pruning), recovered": Row(
        (*THRESHOLD, "method=numerical", *RECOVER), (0.3,)
    ),
    "dress, recovered": Row((*DRESS, *RECOVER), (0.3,)),
    "trsp, recovered": Row((*TRSP, *RECOVER), (0.3,)),
}
OTHERS = {
    "torch-pruning, magnitude": "magnitude",
    "torch-pruning, Taylor": "taylor",
    "block influence (ShortGPT)": "block-influence",
}
"""What other tools do, see `benchmarks.baselines`; run at every sparsity."""
