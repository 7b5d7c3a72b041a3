"""Errors of the Hub with remedies."""

from __future__ import annotations

from labctl_slurm.errors import LabctlError, PreflightError, WrongUseError


def hub_error(error: Exception, model: str, revision: str | None) -> LabctlError | None:
    """An error of huggingface_hub as labctl's, with a remedy; None for possible network errors, which do not prevent a submit."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{model}"
    if isinstance(error, GatedRepoError) and get_token() is None:
        return PreflightError(
            f"gated model, and no token was found: {model}",
            f"accept its terms at {page}, create a token with read access at {constants.ENDPOINT}/settings/tokens, and"
            " export HF_TOKEN=hf_... in this shell (labctl does not store it)",
        )
    if isinstance(error, GatedRepoError):
        return PreflightError(
            f"gated model, and the account of your token has no access: {model}",
            f"accept its terms at {page} (some owners take days to answer); a fine-grained token needs access to gated"
            " repositories",
        )
    if isinstance(error, RepositoryNotFoundError):
        private = "" if get_token() else "; for a private model export HF_TOKEN"
        return PreflightError(f"model not found on the Hub: {model}", f"check its spelling{private}")
    if isinstance(error, RevisionNotFoundError):
        return PreflightError(f"{model} has no revision {revision!r} on the Hub", "correct --revision")
    if isinstance(error, OfflineModeIsEnabled):
        return WrongUseError("HF_HUB_OFFLINE is set in this shell: labctl does not ask the Hub", "unset HF_HUB_OFFLINE")
    return None
