"""Make what job.yaml needs: the dense model and two texts. Needs no network where the model's wheel
is installed; what is already there is kept.
"""

from pathlib import Path

from rayprune.specs.errors import RaypruneError
from rayprune.workers.tools.demo import prepare


def main() -> None:
    """Prepare everything, one line of output each."""
    try:
        for line in prepare(Path(__file__).resolve().parent):
            print(line, flush=True)
    except (OSError, RaypruneError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
