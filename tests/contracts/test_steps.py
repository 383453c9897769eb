"""The driver's typed calls are exactly the steps that workers have."""

import sys
from functools import reduce
from inspect import Parameter, signature
from operator import or_
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from rayprune.orchestrator.execution.steps import Call, Handle, Receipt, Steps
from rayprune.workers.worker import STEPS

CALLS = {name: call for name, call in vars(Steps).items() if not name.startswith("_")}


def received(hint: Any) -> Any:
    """What a worker gets for a handle: the payload."""
    if get_origin(hint) in (Union, UnionType):
        return reduce(or_, map(received, get_args(hint)))
    return get_args(hint)[0] if get_origin(hint) is Handle else hint


def test_every_step_can_be_called() -> None:
    assert CALLS.keys() == STEPS.keys()


@pytest.mark.parametrize("name", STEPS)
def test_a_call_has_the_signature_of_its_step(name: str) -> None:
    step, call = STEPS[name], CALLS[name]
    wanted, given = signature(step).parameters, signature(call).parameters
    assert [(p.name, p.kind, p.default) for p in wanted.values()] == [
        (p.name, p.kind, p.default) for p in given.values()
    ]
    known = vars(sys.modules[step.__module__])
    expected, hints = get_type_hints(step), get_type_hints(call, localns=dict(known))
    returned, (receipt, payload) = hints.pop("return"), get_args(expected.pop("return"))
    assert {key: received(hint) for key, hint in hints.items()} == expected
    assert receipt == Receipt
    assert get_origin(returned) is Call
    assert get_args(returned) == (payload or type(None),)


@pytest.mark.parametrize("name", STEPS)
def test_a_call_asks_for_its_step_with_all_arguments(name: str) -> None:
    parameters = list(signature(CALLS[name]).parameters.values())[1:]
    given = [object() for _ in parameters]
    asked: list[Any] = []
    CALLS[name](Steps(lambda *all_of_them: asked.extend(all_of_them)), *given)  # type: ignore[arg-type]
    assert asked == [name, *given]
    assert not any(p.kind in (Parameter.VAR_KEYWORD, Parameter.KEYWORD_ONLY) for p in parameters)
