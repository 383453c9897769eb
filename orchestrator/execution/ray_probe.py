"""Asks a Ray cluster who it is, as a process of its own: Ray waits long for what does not answer,
and may end the process that asked. Prints one line of JSON: the address, or what is wrong.
"""

import json
import os
import socket
import sys
from contextlib import redirect_stdout
from urllib.parse import urlsplit


def probe(address: str, seconds: float) -> dict[str, str]:
    """`address`, with `auto` resolved as Ray does, once a head node has answered there.

    Raises:
        OSError: nobody listens there.
        ValueError: no address, or Ray Client's.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or _running_here()
    check_address(address)
    parts = urlsplit(f"//{address}")
    socket.create_connection((str(parts.hostname), int(parts.port or 0)), seconds).close()
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


def check_address(address: str) -> None:
    """See that an address is that of a head node.

    Raises:
        ValueError: it is not.
    """
    try:
        parts = urlsplit(f"//{address}")
        if "://" not in address and parts.hostname and parts.port:
            return
    except ValueError:
        pass
    raise ValueError(
        f"{address!r} is no HOST:PORT of a head node (port 6379, unless it was started with"
        " another); from outside a cluster use `rayprune submit`"
    )


def main() -> None:
    """Probe the address that is the first argument; the second says how long to try."""
    with redirect_stdout(sys.stderr):
        try:
            answer = probe(sys.argv[1], float(sys.argv[2]))
        except Exception as error:  # the process boundary
            answer = {"problem": str(error) or type(error).__name__}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
