"""Where a layer's matrices read: those that read the same belong to one site, and share the
statistic of what they read. No torch.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rayprune.specs.errors import SpecError
from rayprune.specs.methods.options import Masks
from rayprune.workers.model.description import Consumer, Group, Model

NAMES = {"attention": ("qkv", "o"), "ffn": ("up", "down")}
"""By kind of group: the site of the matrices whose outputs are its units, and that of its
consumer."""


@dataclass(frozen=True)
class Site:
    """The matrices of a layer that read the same."""

    name: str
    weights: tuple[str, ...]
    """Names of the matrices, (out, in) unless transposed."""
    transposed: bool
    ends_block: bool
    """Whether a block's output is what it computes."""
    input: Group
    """What it reads, as a group: its units are the numbers of a token, and the parameters of each
    are its matrices' weights for it, one for every output.
    """


def sites_of(model: Model) -> dict[str, Site]:
    """The sites of every layer, by name, in the order in which a layer reads them.

    Raises:
        SpecError: the model is of a kind whose layers are not looked at like this.
    """
    kind = "an encoder" if not model.causal else "a mixture of experts"
    if not model.causal or any(group.count > 1 for group in model.groups) or model.experts:
        raise SpecError(
            f"method sparse: {model.model_type} is {kind}, whose matrices get no zeros yet; take a"
            " decoder without experts, or another method"
        )
    return {site.name: site for group in model.groups for site in _sites(model, group)}


def _sites(model: Model, group: Group) -> Iterator[Site]:
    """Of a group the site of its producers, and that of its consumer."""
    shapes = next(layer.shapes for layer in model.layers if group in layer.groups)
    producers = {
        axis.tensor: shapes[axis.tensor][axis.dim]
        for axis in group.axes
        if len(shapes[axis.tensor]) == 2 and shapes[axis.tensor][1 - axis.dim] == model.hidden
    }
    first, last = NAMES[group.kind]
    transposed, consumer = group.consumer.transposed, group.consumer.weight
    module = next(iter(producers)).removesuffix(".weight")
    alike = replace(group, axes=(), cached=0)
    reads = replace(
        alike,
        name=first,
        num_units=model.hidden,
        consumer=Consumer(module, 1, transposed),
        unit_parameters=sum(producers.values()),
    )
    yield Site(first, tuple(producers), transposed, False, reads)
    reads = replace(
        alike,
        name=last,
        num_units=group.width,
        consumer=replace(group.consumer, columns=1),
        unit_parameters=model.hidden,
    )
    yield Site(last, (consumer,), transposed, True, reads)


def check_widths(model: Model, masks: Masks) -> None:
    """Check that zeros can be counted in whole groups of neighbouring inputs, alike in all layers.

    Raises:
        SpecError: a width is no multiple, or not the same in all layers.
    """
    sites = sites_of(model)
    kinds = Counter(name for group in model.groups for name in NAMES[group.kind])
    for name, site in sites.items():
        if kinds[name] > 1 and name in masks.sites:
            raise SpecError(
                f"method.sites: {name}: not all layers of this {model.model_type} have the same"
                " there; leave it out of method.sites, or take another method"
            )
        if masks.group and name in masks.sites and site.input.width % masks.group:
            raise SpecError(
                f"method.pattern: {masks.pattern}: {site.weights[0]} reads {site.input.width}"
                f" numbers, no multiple of {masks.group}; leave {name} out of method.sites, or set"
                " pattern: unstructured"
            )
