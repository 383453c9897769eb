"""Chameleon, which reads pictures as tokens of its vocabulary: what turns them into tokens goes
along. Its class never predicts a picture's token, so that text is what is judged.
"""

from dataclasses import replace

from rayprune.specs.errors import ModelError
from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Model
from rayprune.workers.model.families.decoder import Decoder, biased_by
from rayprune.workers.model.families.parts import ATTENTION

_NORMS = {
    f"self_attn.{name}_norm.{tensor}": axes
    for name, axes in {"q": ("n", "h"), "k": ("1", "h")}.items()
    for tensor in ("weight", "bias")
}
"""Of queries and keys, with numbers of its own for every head."""


class Chameleon(Decoder):
    """A decoder beside what it sees with."""

    def describe(self, config: Config) -> Model:
        """The text model in it.

        Raises:
            ModelError: its norms stand behind the blocks (the 34B).
        """
        if config.flag("swin_norm"):
            raise ModelError(f"{config.file}: swin_norm is not supported for chameleon")
        raw = dict(config.raw)
        if raw.get("architectures") == [self.architecture]:
            del raw["architectures"]  # it is no other head's
        return replace(
            super().describe(replace(config, raw=raw)),
            auto_class=self.architecture,
            beside=("model.vqmodel",),
            open_outside=True,
            sized_alike="a model that sees cannot be built with layers of sizes of their own",
        )


FAMILY = Chameleon(
    "ChameleonForConditionalGeneration",
    groups=32,
    attention=replace(ATTENTION, follows=_NORMS),
    layer_returns=1,
    biased=biased_by(attention_bias="self_attn.", mlp_bias="mlp."),
    heads_stay="its class takes all heads to be as wide as the hidden size, so all have to stay",
)
