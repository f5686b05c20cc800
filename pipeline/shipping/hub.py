"""An exported folder becomes a repository of the hub, or a new commit of one."""

from pathlib import Path

from data_prep.errors import UserError, first_line
from pipeline.shipping import folder as shipped


def check_name(repository: str) -> None:
    """Refuse a name that no repository of the hub can have, before anything is made."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repository!r} is no name of a repository: {first_line(error)}") from None


def push(folder: Path, repository: str, *, public: bool = False) -> str:
    """Upload what an export has written, and nothing that somebody has put beside it; returns the commit's address.

    Args:
        folder: the exported one.
        repository: NAME or OWNER/NAME; it is made if it does not exist.
        public: whether a new one can be seen by all; one that exists stays as it is.

    Raises:
        UserError: a file of the folder is missing or was changed, nobody is logged in, or the hub refuses.
    """
    from huggingface_hub import HfApi

    if not shipped.is_whole(folder):
        raise UserError(f"{folder} is not whole: nothing was pushed. Export it again")
    names = sorted(shipped.read_marker(folder)["files"])
    api = HfApi()
    try:
        made = api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=names,
            commit_message="A student distilled with MiniLMv2",
        )
    except Exception as error:  # no network, no login, no right, no room: the library has a kind of its own for each
        raise UserError(
            f"{folder} is whole, but was not pushed to {repository}: {first_line(error)}. If it is a "
            "matter of rights, log in with `hf auth login` or set HF_TOKEN; the same command tries again"
        ) from error
    return commit.commit_url
