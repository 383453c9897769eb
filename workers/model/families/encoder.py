"""The usual encoder: a `Decoder`'s layers read in both directions, under one of several heads or
under none.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rayprune.specs.errors import SpecError
from rayprune.workers.model.config import UNITS, Config
from rayprune.workers.model.description import Group, Model, RemoteCode, Shape, Shapes
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import WITH_BIAS, Heads, Keys, Part
from rayprune.workers.model.form import Form
from rayprune.workers.model.sized_layers import resized_layers

LOADED_BY = {
    "Model": "AutoModel",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForPreTraining": "AutoModelForPreTraining",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForNextSentencePrediction": "AutoModelForNextSentencePrediction",
}
"""How a family's classes end, and what builds them."""
_INSIDE = (
    "layers_at",
    "embedding",
    "position_table",
    "token_types",
    "projection",
    "pooler",
    "last_norm",
)
_DECODES = ("is_decoder", "add_cross_attention")
HEADS_STAY = (
    "its class takes the head size from the hidden size and the number of heads, so fewer heads"
    " need a class of their own, which goes with the folder: budget.per_layer: true; or zeros in"
    " their place, which save nothing: budget.per_layer and export.pad"
)
ENCODER_KEYS = Keys(kv_heads=None, head_dim=None)
BERT_HEAD = {
    "cls.predictions.bias": "V",
    "cls.predictions.transform.dense.weight": "DD",
    "cls.predictions.transform.dense.bias": "D",
    "cls.predictions.transform.LayerNorm.weight": "D",
    "cls.predictions.transform.LayerNorm.bias": "D",
}
ATTENTION = Part(
    "attention.output.dense",
    {"attention.self.query": "h", "attention.self.key": "h", "attention.self.value": "h"},
    "attention.output.dense",
    holds=("attention.self.", "attention.output.dense."),
)
FFN = Part(
    "output.dense",
    {"intermediate.dense": "1"},
    "output.dense",
    holds=("intermediate.", "output.dense."),
)


def _one_head_size(family: Decoder, config: Config, heads: int, target: str) -> Form:
    """No stock class holds fewer heads.

    Raises:
        SpecError: always.
    """
    del family, heads, target
    raise SpecError(f"{config.model_type}: {HEADS_STAY}")


@dataclass(frozen=True)
class Encoder(Decoder):
    """A family of encoders; `architecture` is its bare class, the defaults are BERT's names.

    Names outside the layers are those of the bare class: under a head they begin with `backbone`.
    Of these tensors only those that sizes follow from are described: others go along as they are.
    """

    keys: Keys = ENCODER_KEYS
    attention: Part = ATTENTION
    ffn: Part = FFN
    norms: tuple[str, ...] = ("attention.output.LayerNorm", "output.LayerNorm")
    norm_tensors: tuple[str, ...] = WITH_BIAS
    biased: Callable[[Config], Sequence[str]] = lambda config: ("",)
    scale: Callable[[Config], float | None] = lambda config: None
    layers_at: str = "encoder.layer"
    backbone: str = "bert"
    embedding: str = "embeddings.word_embeddings.weight"
    embedded: int | None = None
    """The embeddings' size, where it may differ from the hidden size."""
    projection: str = ""
    """The linear map from embeddings of a size of their own to the hidden size."""
    position_table: str | None = "embeddings.position_embeddings.weight"
    token_types: str = "embeddings.token_type_embeddings.weight"
    """The matrix of what kinds of tokens there are; empty: there is none."""
    outer_norms: tuple[str, ...] = ("embeddings.LayerNorm",)
    last_norm: str = ""
    pooler: str = "pooler."
    """What names of the pooler's tensors begin with."""
    head: str = "cls.predictions.decoder.weight"
    """The matrix of the masked-language-model head."""
    predicts: tuple[str, ...] = ("ForMaskedLM",)
    """Classes that have it, by what their names end with."""
    predicting: Mapping[str, str] = field(default_factory=lambda: BERT_HEAD)
    """Further tensors of that head: their axes, D the hidden size, E that of the embeddings, V the
    vocabulary."""
    tied_bias: str = "cls.predictions.decoder.bias"
    """A second name of that head's bias, in old files."""
    tied: bool = True
    recomputed: tuple[str, ...] = (".position_ids", ".token_type_ids")
    fewer_heads: Callable[[Decoder, Config, int, str], Form] = _one_head_size

    def of(self, config: Config) -> "Encoder":
        """The family as it is with a config: bare, or under a head."""
        found = super().of(config)
        assert isinstance(found, Encoder)
        if self._suffix(config) == "Model":
            return replace(found, backbone="")
        start = f"{found.backbone}."
        named = {key: start + name for key in _INSIDE if (name := getattr(found, key))}
        return replace(found, outer_norms=tuple(start + n for n in found.outer_norms), **named)

    def _suffix(self, config: Config) -> str:
        """What the name of the config's class ends with; of one without classes, the bare one's."""
        given = config.raw.get("architectures")
        name = str(given[0]) if isinstance(given, list) and given else self.architecture
        return name.removeprefix(self.architecture.removesuffix("Model"))

    def check_class(self, config: Config) -> None:
        """Refuse a class that is none of this family's, and one that decodes.

        Raises:
            ModelError: it names one.
        """
        stem = self.architecture.removesuffix("Model")
        if self._suffix(config) not in LOADED_BY:
            known = ", ".join(stem + suffix for suffix in LOADED_BY)
            remedy = "save the model from one of them"
            raise config.wrong("architectures", f"one of {known}", remedy=remedy)
        for key in _DECODES:
            if config.flag(key):
                raise config.wrong(key, "false: encoders are pruned, not decoders of their kind")
        if config.raw.get("position_embedding_type") not in (None, "absolute"):
            raise config.wrong("position_embedding_type", "absolute, which transformers computes")
        if self.hidden(config) % config.integer(self.keys.heads):
            raise config.wrong(self.keys.heads, f"a divisor of {self.keys.hidden}")

    def describe(self, config: Config) -> Model:
        """The model that a config says."""
        suffix = self._suffix(config)
        model = super().describe(config)
        predicts = suffix in self.predicts
        tied = model.tied and predicts
        return replace(
            model,
            auto_class=LOADED_BY[suffix],
            head=self.head if predicts else "",
            tied=tied,
            positions=model.positions and model.positions - self.more_positions,
            recomputed=(*self.recomputed, *((self.tied_bias,) if tied and self.tied_bias else ())),
            caches=(),
            causal=False,
            open_outside=True,
            made_up=(self.pooler,),
        )

    def heads(self, config: Config) -> Heads:
        """Sizes of the attention; a layer of its own size keeps the head size."""
        dense = super().heads(config)
        own = _own_units(config, "heads", dense.heads)
        return replace(dense, heads=own, groups=own)

    def width(self, config: Config) -> int:
        """FFN channels."""
        return _own_units(config, "neurons", super().width(config))

    def of_layer(self, config: Config, layer: int) -> Config:
        """The config of one layer of a model whose layers differ in size."""
        return replace(config, raw={**config.raw, _OWN: config.units_of(layer)})

    def code(self, config: Config) -> RemoteCode:
        """The class that builds models whose layers differ in size."""
        dense = replace(config, raw={k: v for k, v in config.raw.items() if k != UNITS})
        suffix, groups = self._suffix(config), self._layer(dense).groups
        stem = self.architecture.removesuffix("Model")
        return resized_layers(stem + suffix, suffix, self.layers_at, groups)

    def sized(self, config: Config, layers: Sequence[Mapping[str, int]]) -> dict[str, object]:
        """The key from which that class takes the units of every layer."""
        del config
        return {UNITS: [dict(kept) for kept in layers]}

    def _outer(self, config: Config, hidden: int, vocabulary: int, tied: bool) -> Shapes:
        size = self.embedded or hidden
        shapes: dict[str, Shape] = {self.embedding: (vocabulary, size)}
        if self.position_table:
            shapes[self.position_table] = (config.integer(self.keys.positions), size)
        if self.token_types:
            shapes[self.token_types] = (config.integer("type_vocab_size", 2), size)
        for norm in self.outer_norms:
            shapes |= self._norm(norm, size)
        if self.projection:
            shapes[f"{self.projection}.weight"] = (hidden, size)
            shapes[f"{self.projection}.bias"] = (hidden,)
        if self.last_norm:
            shapes |= self._norm(self.last_norm, hidden)
        if self._suffix(config) in self.predicts:
            sizes = {"D": hidden, "E": size, "V": vocabulary}
            shapes |= {n: tuple(sizes[a] for a in axes) for n, axes in self.predicting.items()}
            shapes |= {} if tied else {self.head: (vocabulary, size)}
        return shapes

    def _group(self, name: str, config: Config, shapes: Shapes, units: int, columns: int) -> Group:
        group = super()._group(name, config, shapes, units, columns)
        if group.kind == "ffn":
            return replace(group, some_stay=True)
        stock = None if self.heads_stay else HEADS_STAY
        return replace(group, title="heads", cached=0, stock=stock, some_stay=True)


_OWN = f"{UNITS} of one layer"
"""Under this key `of_layer` puts what a layer keeps."""


def _own_units(config: Config, name: str, dense: int) -> int:
    units = config.raw.get(_OWN)
    return int(units.get(name, dense)) if isinstance(units, dict) else dense
