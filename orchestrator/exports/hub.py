"""Put an exported folder on the Hugging Face Hub, by its own client. Everything is checked before anything is sent."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, cast

from cache_store.errors import SegpropError, StorageDenied, StorageUnavailable, UserError, first_line
from workers.export import damaged_files
from workers.specs.export_files import EXPORTED

#: The hub's own rule for names.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_DENIED = (401, 402, 403)


def exported_folder(place: Path, models: str, regime: str | None, config_file: str) -> Path:
    """Return the folder to be uploaded: `place` itself, or of a run what lies below its folder `models`.

    UserError when there is none, or several and no regime is named."""
    if not (place / config_file).is_file():
        if regime is not None:
            raise UserError(f"--regime: {place} is no run, so it has no regimes; leave it out")
        return place
    found = sorted(folder.name for folder in (place / models).glob("*/") if not folder.name.startswith("."))
    flag = "" if models == "model" else f" --{models}"
    if not found:
        raise UserError(f"{place / models}: there is nothing yet; segprop export {place}{flag} writes it")
    if regime is None and len(found) > 1:
        raise UserError(f"--regime: {place} has several; name one of {', '.join(found)}")
    if regime is not None and regime not in found:
        raise UserError(f"--regime: {regime} is not in {place / models}; there are {', '.join(found)}")
    return place / models / (regime or found[0])


def check(folder: Path, name: str) -> str:
    """Return the token. UserError unless it is there, the folder is an export as it was written, the name is one."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{name}: is no name on the hub; give OWNER/NAME, of letters, digits, '.', '_' and '-'")
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name a run, or a folder that segprop export wrote")
    if not (folder / EXPORTED).is_file():
        raise UserError(f"{folder}: is no folder that segprop export wrote, it has no {EXPORTED}")
    damaged = damaged_files(folder)
    if damaged:
        raise UserError(
            f"{folder}: {', '.join(damaged[:4])}: missing, or not as it was written; segprop export writes it again"
        )
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise UserError(
            "HF_TOKEN: is not set, so the hub would not know you; put a token that may write into the environment, or "
            "as a line HF_TOKEN=... into .env here (huggingface.co/settings/tokens)"
        )
    return token


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder as one commit to the hub's repository `name`, made where it is not there, and return the address
    of the commit.

    UserError as `check`, and where a repository that is to be private is public; StorageDenied where the token may not;
    StorageUnavailable where the hub cannot be reached.
    """
    token = check(folder, name)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # Of whichever library its client uses.
    unreachable: type[Exception] = cast("Any", HfHubHTTPError).__bases__[0]
    # Read now: the client would take what the environment said when it was loaded.
    api: Any = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise UserError(f"--private: {name} is there already, and public; nothing was uploaded")
        return str(api.upload_folder(folder_path=folder, repo_id=name, commit_message="Upload by segprop").commit_url)
    except HfHubHTTPError as error:
        raise _typed(error.response.status_code, name, first_line(error)) from error
    except (unreachable, ConnectionError) as error:
        raise StorageUnavailable(f"{api.endpoint}: cannot be reached: {first_line(error)}") from error
    except ValueError as error:  # names and metadata that the hub does not take
        raise UserError(f"{name}: {first_line(error)}") from error


def _typed(status: int, name: str, said: str) -> SegpropError:
    if status in _DENIED:
        return StorageDenied(f"{name}: the hub refuses ({status}): the token must be one that may write there. {said}")
    if status >= 500:
        return StorageUnavailable(f"{name}: the hub failed ({status}); try again. {said}")
    return UserError(f"{name}: the hub does not take it ({status}). {said}")
