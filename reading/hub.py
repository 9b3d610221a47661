"""Weights from the Hugging Face hub: whether it gives them, and why it gives nothing.

Offline, the hub's own library tries again for half a minute. So a script asks once, and
before its slow imports.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator
from pathlib import Path

from utils import StageError

UNI_HUB, UNI_FILE = "MahmoodLab/UNI", "pytorch_model.bin"
LITE = "efficientnet_lite0"  # the embedded backbone, which needs no hub
PATIENCE = 3.0  # seconds for the hub to answer
BUSY = 429  # of HTTP; this status and those above may be others at the next try
NO_NETWORK = (
    "is not in the hub's local cache, and the hub cannot be reached: no internet",
    "Connect this machine to the internet",
)
unreachable = False  # what check_others found


def ask(token: str | None) -> None:
    """One look at UNI's file on the hub, without a second try. Raises what the hub's library does.

    In a thread, since to find the address of the hub may take far longer than ``PATIENCE``.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    raised: list[Exception] = [TimeoutError(errno.ETIMEDOUT, "no answer")]

    def look() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(UNI_HUB, UNI_FILE), token=token, timeout=PATIENCE)
            raised.clear()
        except Exception as error:  # raised below  # noqa: BLE001
            raised[:] = [error]

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    for error in raised:
        raise error


def check_uni(login: str | None) -> None:
    """Raise StageError if UNI is not in the hub's local cache and the hub does not give it."""
    from huggingface_hub import constants, errors, get_token, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(UNI_HUB, UNI_FILE), str):
        return
    token = login or get_token()
    with explained(UNI_HUB, token is not None):
        try:
            ask(token)
        except errors.HfHubHTTPError as error:
            if error.response.status_code < BUSY:
                raise


def check_others() -> None:
    """Have the hub's library look into its local cache alone if the hub cannot be reached."""
    from huggingface_hub import constants, errors

    global unreachable
    transport: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        ask(None)
    except errors.HfHubHTTPError:
        return  # it answers
    except (OSError, transport):
        unreachable = not constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = True


def download_uni(login: str | None) -> Path:
    """UNI's file in the hub's cache, else from the hub by --login, HF_TOKEN or the stored login."""
    from huggingface_hub import errors, get_token, hf_hub_download

    with contextlib.suppress(errors.LocalEntryNotFoundError):
        return Path(hf_hub_download(UNI_HUB, UNI_FILE, local_files_only=True))
    token = login or get_token()
    with explained(UNI_HUB, token is not None):
        return Path(hf_hub_download(UNI_HUB, UNI_FILE, token=token))


@contextlib.contextmanager
def explained(repository: str, has_token: bool) -> Iterator[None]:
    """Turn failures of the hub into a StageError; a full disk is left to the caller."""
    from huggingface_hub import errors

    # What the hub's own HTTP library raises
    transport: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except (OSError, errors.EntryNotFoundError, transport) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
            raise
        raise hub_error(error, repository, has_token) from None


def hub_error(error: Exception, repository: str, has_token: bool) -> StageError:
    """Why the hub gave nothing. The error's own text is left out, for it may quote the request."""
    from huggingface_hub import constants, errors

    page = f"https://huggingface.co/{repository}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    causes = (error, error.__cause__)
    offline = any(isinstance(e, errors.OfflineModeIsEnabled) for e in causes)
    if unreachable:
        why, remedy = NO_NETWORK
    elif constants.HF_HUB_OFFLINE or offline:
        why = "is not in the hub's local cache, and HF_HUB_OFFLINE forbids the download"
        remedy = "Unset HF_HUB_OFFLINE for one run"
    elif isinstance(error, errors.GatedRepoError) and has_token:
        why = "is gated, and the account of your token has no access to it"
        remedy = f"Ask for access at {page} and wait until it is granted"
    elif isinstance(error, errors.GatedRepoError):
        why = "is gated, and no token was given"
        remedy = f"Ask for access at {page} and set HF_TOKEN to a token of that account"
    elif status == 401:
        why = "was refused (401): the token is wrong or has expired"
        remedy = "Set HF_TOKEN to a new token from https://huggingface.co/settings/tokens"
    elif isinstance(error, (errors.RepositoryNotFoundError, errors.EntryNotFoundError)) and status:
        why = "is not on the hub, or holds no weights under the expected name"
        remedy = "Correct the name given to --backbone"
    elif status:
        why, remedy = f"cannot be read now: the hub answered {status}", "Try again later"
    else:
        why, remedy = NO_NETWORK
    return failure(repository, why, remedy)


def failure(repository: str, why: str, remedy: str) -> StageError:
    return StageError(
        f"{repository} {why}.",
        f"{remedy}, then run the same command. Or give a copy of the weights: --weights FILE. "
        f"Or take the embedded backbone, whose features are others: --backbone {LITE}",
    )
