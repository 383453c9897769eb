"""Whether the engines that a job names can hold a model as it will be written. No torch."""

from rayprune.specs.errors import SpecError
from rayprune.workers.model.config import Config
from rayprune.workers.model.ctranslate2 import check_ctranslate2
from rayprune.workers.model.deci_lm import deci_lm_of
from rayprune.workers.model.ggml import ggml_of
from rayprune.workers.model.older import why_not_by_4


def check_target(target: str, config: Config) -> None:
    """Check one target of `export.target` with an exported folder's config.

    Raises:
        SpecError: it cannot hold the model; the ways that are left.
    """
    match target:
        case "transformers-4":
            if why := why_not_by_4(config.raw):
                raise SpecError(
                    f"export.target: transformers-4: {why}; or leave it out of export.target"
                )
        case "vllm" if config.layers_differ:
            deci_lm_of(config)
        case "ctranslate2":
            check_ctranslate2(config)
        case "gguf" | "gguf-q8_0":
            ggml_of(config)
