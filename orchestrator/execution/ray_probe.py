"""Asks a Ray cluster who it is, as a process of its own: Ray waits long for what does not answer,
and may end the process that asked. Prints one line of JSON: the address, or what is wrong.
"""

import json
import sys
from contextlib import redirect_stdout


def probe(address: str) -> dict[str, str]:
    """`address`, with `auto` resolved as Ray does, once a head node has answered there.

    Raises:
        ConnectionError: no cluster runs on this machine.
        RayError: it does not answer, or not to this token.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    if address == "auto":
        address = _running_here()
    GcsClient(address=address)
    return {"address": address}


def _running_here() -> str:
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found = canonicalize_bootstrap_address("auto", None)
    except ConnectionError:
        found = None
    if found is None:
        raise ConnectionError("no Ray cluster runs on this machine, and RAY_ADDRESS names none")
    return str(found)


def main() -> None:
    """Probe the address that is the first argument."""
    with redirect_stdout(sys.stderr):
        try:
            answer = probe(sys.argv[1])
        except Exception as error:  # the process boundary
            answer = {"problem": str(error) or type(error).__name__}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
