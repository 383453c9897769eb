"""What of a job is for causal language models alone, for those that are a whole, and for those
whose layers need nothing but hidden states.
"""

from rayprune.specs.allocation import ThresholdAllocation
from rayprune.specs.errors import SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.methods.options import DriveOut
from rayprune.workers.model.description import Model

_WHOLE = "an encoder's windows are whole texts, each with its special tokens; leave it out"


def check_encoder(job: JobSpec) -> None:
    """Refuse what an encoder has not: it predicts no next token, and keeps no cache.

    Raises:
        SpecError: the job asks for it.
    """
    trains = "trains on the loss of a causal language model, which an encoder has not"
    reasons = {
        "method.scale: gradients": (
            job.gradient_windows > 0,
            "are those of the loss of a causal language model, which an encoder has not; set it to"
            " weights",
        ),
        f"method: {job.method.name}": (
            bool(job.method.trainings),
            f"{trains}; take stat, or another method that trains nothing",
        ),
        f"method.name: {job.method.name}": (
            job.steps is not None,
            "its gate compares next-token distributions, which an encoder has not; take the method"
            " of its steps alone",
        ),
        "recover": (
            job.recover is not None,
            f"{trains}; leave it out, and train the pruned model for its task",
        ),
        "budget.kv_bytes_per_token": (
            job.budget.kv_bytes_per_token is not None,
            "an encoder keeps no KV cache; leave it out",
        ),
        "calibration.own": (
            job.calibration.own is not None,
            "is written token by token, which an encoder cannot; calibrate on text of its task",
        ),
        "calibration.bos": (not job.calibration.bos, _WHOLE),
        "evaluation.bos": (job.evaluation is not None and not job.evaluation.bos, _WHOLE),
        "evaluation.stride": (
            job.evaluation is not None and job.evaluation.stride is not None,
            "is of perplexity; leave it out, an encoder's windows do not overlap",
        ),
        "evaluation.prompts": (
            job.evaluation is not None and len(job.evaluation.prompts) > 0,
            "an encoder writes no text; leave it out",
        ),
        "evaluation.tasks": (
            job.evaluation is not None and len(job.evaluation.tasks) > 0,
            "lm-eval asks for probabilities of texts, which an encoder has not; leave it out",
        ),
    }
    for option, (asked, reason) in reasons.items():
        if asked:
            raise SpecError(f"{option}: {reason}")


def check_part(job: JobSpec) -> None:
    """Refuse trainings of a text model that is part of a larger one: nothing is known of the rest.

    Raises:
        SpecError: the job asks for one.
    """
    if job.method.trainings:
        raise SpecError(
            f"method: {job.method.name}: trains the model, of which only the text part is read;"
            " take stat, or another method that trains nothing"
        )
    if job.recover:
        raise SpecError("recover: leave it out: of the model only the text part is read")


def check_layers_apart(job: JobSpec, model: Model) -> None:
    """Refuse what looks at a layer by itself, where others have a part in it.

    Raises:
        SpecError: the job asks for it.
    """
    first, recover = job.method.before_cut, job.recover
    alone = "a layer is trained by itself, which has to be given what depends on the tokens, too"
    reasons = {
        f"method: {job.method.name}": (
            bool(model.token_inputs) and isinstance(first, DriveOut) and first.each_layer,
            f"{alone}; set method.scope: model",
        ),
        "recover.scope": (
            bool(model.token_inputs) and recover is not None and recover.scope == "layer",
            f"{alone}; set it to model",
        ),
        "method.scale: gradients": (
            bool(model.for_later) and job.gradient_windows > 0,
            "go back layer by layer, and layers read what others have left; set it to weights",
        ),
    }
    follows = any(group.times for group in model.groups)
    reasons["budget.allocation"] = (
        job.budget.per_layer and isinstance(job.budget.allocation, ThresholdAllocation) and follows,
        "FFNs of two widths are not told by one threshold; take curves or search",
    )
    for option, (asked, reason) in reasons.items():
        if asked:
            raise SpecError(f"{option}: {model.model_type}: {reason}")
