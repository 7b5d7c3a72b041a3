"""What the hub says against this user, in the words of a person who can mend it."""

from __future__ import annotations

from labctl_slurm.errors import LabctlError, PreflightError, WrongUseError


def told_of(error: Exception, model: str, revision: str | None) -> LabctlError | None:
    """An error of the hub's client as labctl's, with what to do; None for what may be the network: it
    has a hundred faces, none of which forbids to submit."""
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
            f"{model} is gated, and no token was found",
            f"accept its terms at {page}, make a token that may read it at {constants.ENDPOINT}/settings/tokens, and"
            " export HF_TOKEN=hf_... in this shell (labctl writes it nowhere)",
        )
    if isinstance(error, GatedRepoError):
        return PreflightError(
            f"{model} is gated, and your token's account has not been let in",
            f"accept its terms at {page} (some owners take days to answer); a fine-grained token must be allowed to read gated"
            " repositories",
        )
    if isinstance(error, RepositoryNotFoundError):
        private = "" if get_token() else "; for a private model export HF_TOKEN"
        return PreflightError(f"the hub has no model {model}, or not for you", f"check its spelling{private}")
    if isinstance(error, RevisionNotFoundError):
        return PreflightError(f"{model} has no revision {revision!r} on the hub", "correct --revision")
    if isinstance(error, OfflineModeIsEnabled):
        return WrongUseError("HF_HUB_OFFLINE is set in this shell, so the hub is not asked", "unset HF_HUB_OFFLINE")
    return None
