"""A saved folder to a repository of the Hugging Face Hub, private unless it is asked to be public."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedloom.errors import ConnectionFailed, FedloomError, OutputError, first_line

Asked = Callable[[], Any]


def require_repository_name(name: str) -> None:
    """Check the name of a repository.

    Raises:
        OutputError: It is not ``OWNER/NAME`` as the Hub has it.
    """
    import huggingface_hub

    hub: Any = huggingface_hub
    wrong = name.count("/") != 1
    try:
        hub.utils.validate_repo_id(name)
    except hub.errors.HFValidationError:
        wrong = True
    if wrong:
        raise OutputError(f"--hub {name!r}: give OWNER/NAME, such as my-name/our-model")


class HubRepository:
    """A repository of models that a folder is uploaded to.

    Attributes:
        is_public: Whether anybody can read it, as the Hub last said; ``False`` before there is one.
    """

    def __init__(self, name: str, *, public: bool, api: Any = None) -> None:
        """Check, before anything is written, that it can be.

        Args:
            name: ``OWNER/NAME``.
            public: Whether anybody may read it.
            api: What calls the Hub (default: ``huggingface_hub.HfApi()``).

        Raises:
            OutputError: The name is none, or the repository is public and this was not asked for.
            ConnectionFailed: This machine is offline, has no token, or the Hub does not let it.
        """
        require_repository_name(name)
        self.name, self.public = name, public
        self.is_public = False
        self.api = api or _api()
        _asked(self.api.whoami, "who you are, by the token of hf auth login or of HF_TOKEN")
        if self._exists():
            self._require_private_as_asked()

    def upload(self, folder: Path) -> str:
        """Make the repository where there is none yet, upload all files of a folder, return its address.

        Raises:
            OutputError: It is public, and this was not asked for.
            ConnectionFailed: The Hub does not take it.
        """
        _asked(
            lambda: self.api.create_repo(self.name, private=not self.public, exist_ok=True),
            f"to make {self.name}",
        )
        self._require_private_as_asked()
        _asked(
            lambda: self.api.upload_folder(
                repo_id=self.name,
                folder_path=str(folder),
                commit_message="Upload by fedloom export",
            ),
            f"to take {folder} as {self.name} (hf upload {self.name} {folder} tries again)",
        )
        return f"https://huggingface.co/{self.name}"

    def _exists(self) -> bool:
        return bool(
            _asked(lambda: self.api.repo_exists(self.name), f"whether there is {self.name}")
        )

    def _require_private_as_asked(self) -> None:
        found = _asked(lambda: self.api.repo_info(self.name), f"what {self.name} is")
        self.is_public = not found.private
        if self.is_public and not self.public:
            raise OutputError(
                f"{self.name} is there already, and anybody can read it: give --public if that is meant, "
                "or another name with --hub"
            )


def require_online() -> None:
    """Check that this machine is not told to be offline.

    Raises:
        ConnectionFailed: It is.
    """
    from huggingface_hub import constants

    own: Any = constants
    if own.HF_HUB_OFFLINE:
        raise ConnectionFailed(
            "HF_HUB_OFFLINE is set, so nothing can go to the Hub: unset it, or leave --hub out"
        )


def _api() -> Any:
    from huggingface_hub import HfApi

    require_online()
    return HfApi(library_name="fedloom")


def _asked(call: Asked, what: str) -> Any:
    """Return what the Hub answers.

    Raises:
        ConnectionFailed: It does not, or refuses.
    """
    try:
        return call()
    except FedloomError:
        raise
    except Exception as error:  # the library raises what the network and the Hub raise
        raise ConnectionFailed(f"the Hub was asked {what}: {first_line(error)}") from error
