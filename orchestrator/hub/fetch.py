"""Models by their names on the Hugging Face Hub: fetched into its cache, safetensors and texts
alone.
"""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rayprune.specs.errors import ModelError, ResourceError
from rayprune.workers.model.folder import CONFIG_NAME, INDEX_NAME
from rayprune.workers.store.layout import CARD_FILE
from rayprune.workers.store.side_files import COPIED, NEVER_COPIED

DESCRIBING = (CONFIG_NAME, CARD_FILE, "adapter_config.json", *COPIED)
WEIGHTS = ("model*.safetensors", INDEX_NAME)


def fetched(name: str, revision: str | None, weights: bool) -> Path:
    """The folder in the Hub's cache that holds a model at a commit; what is there already is not
    fetched again. Without `weights` they are there only if they were before.

    Raises:
        ModelError: there is no such model, or it is not ours to read.
        ResourceError: the Hub does not answer.
    """
    wanted = [*DESCRIBING, *WEIGHTS] if weights else list(DESCRIBING)
    at = f"{name} at {revision or 'main'}"
    try:
        place = snapshot_download(
            name,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=[f"*{ending}" for ending in NEVER_COPIED],
        )
    except GatedRepoError:
        raise ModelError(
            f"{at}: the Hub shows it to those who accept its terms: accept them on its page, then"
            " log in with `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise ModelError(
            f"{at}: neither a folder, nor on the Hub (or not for you to see); correct model.path"
            " and model.revision, or log in with `hf auth login`"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ResourceError(
            f"{at}: no such folder, and it cannot be fetched from the Hub:"
            f" {str(error).splitlines()[0]}; check the network, or download it elsewhere and set"
            " model.path to its folder"
        ) from error
    return Path(place)
