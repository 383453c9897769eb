"""Workloads for the tests of the cost formulas: one small enough for a pencil, and one large enough
for every part to show.
"""

from dataclasses import replace

from rayprune.orchestrator.planning.layer_kinds import LayerKind
from rayprune.orchestrator.planning.workload import Workload
from rayprune.specs.methods.ranking.stat import StatOptions
from rayprune.workers.model.description import Block, Consumer, Group

HEADS = Group(
    name="heads",
    kind="attention",
    title="KV groups",
    num_units=2,
    axes=(),
    consumer=Consumer("attention.out", columns=3),
    block=Block("attention"),
    unit_parameters=50,
)
NEURONS = Group(
    name="neurons",
    kind="ffn",
    title="FFN channels",
    num_units=10,
    axes=(),
    consumer=Consumer("ffn.out", columns=1),
    block=Block("ffn"),
    unit_parameters=12,
)
EXPERTS = replace(NEURONS, name="experts", title="channels of experts", count=4, active=2)
DENSE = LayerKind(
    first=0,
    num_layers=6,
    groups=(HEADS, NEURONS),
    parameters=300,
    num_bytes=600,
    attention_width=12,
)
SPARSE = LayerKind(
    first=0,
    num_layers=6,
    groups=(HEADS, EXPERTS),
    parameters=700,
    num_bytes=1400,
    attention_width=12,
)
LOAD = Workload(
    kinds=(DENSE,),
    kept={"neurons": 7},
    hidden=4,
    vocabulary=100,
    outer_parameters=800,
    bytes_on_disk=5200,
    output_bytes=4768,
    samples=8,
    sequence_length=16,
    shards=4,
    held_out_shards=1,
    micro_batch=2,
    workers=2,
    on_gpu=False,
    element_bytes=4,
    written_element_bytes=2,
    num_candidates=5,
    checkpoint_layers=2,
    evaluation_tokens=0,
    evaluation_window=1,
    ranking=StatOptions(),
)
GPU = replace(LOAD, on_gpu=True, element_bytes=2)
FEW = replace(LOAD, samples=4, sequence_length=2, micro_batch=1)
"""8 tokens, 10 columns: kept as rows."""
EXACT = replace(LOAD, exact=True)
MIXTURE = replace(LOAD, kinds=(SPARSE,), kept={"experts": 5})
LAYERS = replace(LOAD, placement="layers", propagation="dense")
REFIT = replace(LOAD, placement="layers", propagation="refit")
WIDE = replace(DENSE, parameters=12 * 2**14 + 100, groups=(replace(NEURONS, num_units=2**14),))
BIG = replace(
    LOAD,
    hidden=4096,
    kinds=(WIDE,),
    kept={"neurons": 2**13},
    samples=128,
    sequence_length=2048,
    shards=8,
)
"""Large enough for every part to show: T 262,144, F 16,384."""
