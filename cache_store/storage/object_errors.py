"""What an error of an object store means. Pure: decides from the error's class and text.

obstore reports most failures as one class, with the server's status and error code in its text. What is shown to
users is rebuilt from these two: the text itself quotes URLs, which may be signed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from cache_store.errors import StorageDenied, StorageFull, StorageUnavailable, StoreError

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9_.]{1,80})</Code>|\"code\"\s*:\s*\"?([A-Za-z0-9_.]{1,80})")
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestExpired"}
_PASSING_CODES = {"SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable", "ConditionalRequestConflict"}
_FULL_CODES = {"QuotaExceeded", "InsufficientStorage", "StorageFull", "XMinioStorageFull", "InsufficientCapacity"}


class Kind(Enum):
    """What to do about a failed request."""

    ABSENT = "no such object"
    EXISTS = "an object of this name exists"
    DENIED = "refused"
    EXPIRED = "credentials expired"
    NO_CREDENTIALS = "no credentials"
    PLAIN_HTTP = "plain http is not allowed"
    NO_BUCKET = "no such bucket"
    FULL = "no space left"
    NO_RANGES = "the server ignores ranges, or does not say that it honours them"
    PASSING = "passing fault"
    OTHER = "other"


@dataclass(frozen=True)
class Fault:
    """A failed request: what it means, and what the server said (status 0: nothing)."""

    kind: Kind
    status: int
    code: str
    reason: str

    def error(self, doing: str, where: str, variables: str, tries: int = 1) -> StoreError:
        """Make the typed error for users. `where`: the file's URI; `variables`: how the names of the environment
        variables begin that configure this storage."""
        text = f"cannot {doing} {where}: {self.reason}"
        details = {"path": where, "status": self.status, "code": self.code}
        if tries > 1:
            text += f", {tries} times"
        match self.kind:
            case Kind.DENIED:
                return StorageDenied(f"{text}; check the credentials ({variables}…) and what they allow", **details)
            case Kind.EXPIRED:
                return StorageDenied(f"{text}; renew the credentials ({variables}…) and run again", **details)
            case Kind.NO_CREDENTIALS:
                return StorageDenied(f"{text}; set them in the environment ({variables}…)", **details)
            case Kind.PLAIN_HTTP:
                return StorageDenied(f"{text}; use https, or set {variables}ALLOW_HTTP=true", **details)
            case Kind.FULL:
                return StorageFull(f"{text}; free some space and run again", **details)
            case Kind.PASSING:
                return StorageUnavailable(text, **details)
        return StoreError(text, **details)


def fault_of(error: Exception) -> Fault:
    """Return what `error`, raised by obstore, means."""
    text, name = str(error), type(error).__name__
    # The first part names the request; what follows repeats it for debugging, with other errors' words.
    head = text.split("\n\nDebug source", 1)[0]
    found = _STATUS.search(head)
    status = int(found.group(1)) if found else 0
    code_found = _CODE.search(head)
    code = next((group for group in code_found.groups() if group), "") if code_found else ""
    kind = _kind(name, status, code, head)
    return Fault(kind, status, code, _reason(kind, status, code, head))


def _kind(name: str, status: int, code: str, head: str) -> Kind:
    if "169.254.169.254" in head or "169.254.170.2" in head or "metadata.google.internal" in head:
        # With no credentials at hand the client asks the cloud's own machines for some.
        return Kind.NO_CREDENTIALS
    if code == "NoSuchBucket" or code == "ContainerNotFound":
        return Kind.NO_BUCKET
    if code in _EXPIRED:
        return Kind.EXPIRED
    if code in _FULL_CODES or status == 507:
        return Kind.FULL
    if status == 409 or code in _PASSING_CODES:
        # 409: two conditional writes met; neither has necessarily won.
        return Kind.PASSING
    if name in ("AlreadyExistsError", "PreconditionError"):
        return Kind.EXISTS
    if name in ("FileNotFoundError", "NotFoundError"):
        return Kind.ABSENT
    if name in ("PermissionDeniedError", "UnauthenticatedError") or status in (401, 403):
        return Kind.DENIED
    if status == 400 and not code:
        # The answer to a HEAD has no body: this is how expired credentials, or another region's, look there.
        return Kind.DENIED
    if "non-partial" in head:
        return Kind.NO_RANGES
    if "builder error" in head:
        return Kind.PLAIN_HTTP
    if status in (408, 425, 429) or (500 <= status <= 599 and status not in (501, 505)):
        return Kind.PASSING
    if status == 0 and name in ("GenericError", "TimeoutError", "ConnectionError", "OSError", "JoinError"):
        # No answer at all: the connection failed, broke off or timed out.
        return Kind.PASSING
    return Kind.OTHER


def _reason(kind: Kind, status: int, code: str, head: str) -> str:
    if kind is Kind.NO_CREDENTIALS:
        return "no credentials were found"
    if kind is Kind.PLAIN_HTTP:
        return "the endpoint is plain http, which is not allowed unless asked for"
    if kind is Kind.NO_RANGES:
        return str(kind.value)
    if status or code:
        return f"the server answered {' '.join(str(part) for part in (status or '', code) if part)}"
    if "timed out" in head or "timeout" in head.lower():
        return "it timed out"
    words = head.rsplit(" - ", 1)[-1] if " - " in head else head
    # Whatever looks like a URL may be signed.
    words = re.sub(r"\S*://\S*", "…", words)
    return words.strip().splitlines()[0][:200] if words.strip() else str(kind.value)
