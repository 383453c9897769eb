"""A finished run's model to the Hugging Face Hub, card and licence with it."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.reporting.report import read_report
from rayprune.specs.errors import ResourceError, SpecError, one_line
from rayprune.specs.job import HUB_NAME


@dataclass(frozen=True)
class Upload:
    """What goes where."""

    repo: str
    folder: Path
    files: dict[str, int]
    """Bytes of each, by its name in the folder."""


def upload_of(run: Path, repo: str) -> Upload:
    """What `push` would send: the model to take of a finished run, which is checked first.

    Raises:
        SpecError: `repo` is no name of the Hub's.
        VerificationError: the run is not finished, or is not as it was written.
    """
    try:
        validate_repo_id(repo)
        known = bool(HUB_NAME.fullmatch(repo))
    except HFValidationError:
        known = False
    if not known:
        raise SpecError(f"{repo}: is no OWNER/NAME of the Hub")
    verify_run(run)
    folder = read_report(run).model
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    return Upload(repo, folder, sizes)


def push(upload: Upload, public: bool) -> str:
    """Send it; the repository is made if there is none. What the Hub has already is not sent again,
    so a push that was cut off goes on. Returns the address.

    Raises:
        ResourceError: the Hub does not answer, or does not let us.
    """
    hub = HfApi()
    try:
        hub.create_repo(upload.repo, private=not public, exist_ok=True)
        hub.upload_folder(
            repo_id=upload.repo, folder_path=upload.folder, commit_message="Pruned by rayprune"
        )
    # its own errors, and those of whatever it speaks HTTP with
    except Exception as error:
        raise ResourceError(
            f"{upload.repo}: not sent: {one_line(error)}; log in with `hf auth login`,"
            " check the name and the network, and run the same command again"
        ) from error
    return f"{hub.endpoint}/{upload.repo}"
