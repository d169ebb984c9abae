"""Decide who may ask the page for what. Pure: headers in, yes or no out.

On loopback everybody on this machine may look. Elsewhere a token is needed, in a cookie after the login form or in
`Authorization: Bearer`. Any page that a browser shows may send requests to this one, so: the `Host` must be an
address or a name of this server (a name that somebody lets point here is refused), and what acts needs a word that only
our own pages know, from our own origin.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import urlsplit

from cache_store.errors import UserError
from cache_store.storage.durable import read_regular

#: Characters of a token that somebody chose.
LEAST_TOKEN = 16
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
#: Of every answer. Styles and scripts are files of this server; nothing is loaded from elsewhere, nothing frames it.
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
#: Of a report, which has its styles inline and may be anybody's: an origin of its own, which reaches nothing of ours.
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "sandbox allow-scripts allow-downloads"
)


def is_loopback(host: str) -> bool:
    """Tell whether an address or name is this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(path: Path) -> str:
    """Read a token from the first line of a file. UserError when others may read the file, or the token is short."""
    try:
        mode = path.stat().st_mode
        text = read_regular(path, 4096).decode().strip().splitlines()[0]
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise UserError(f"--token-file: {path} cannot be read, or is empty") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"--token-file: others may read {path}; chmod 600 {path}")
    if len(text) < LEAST_TOKEN:
        raise UserError(f"--token-file: the token in {path} has fewer than {LEAST_TOKEN} characters")
    return text


def new_token() -> str:
    return secrets.token_urlsafe(24)


@dataclass(frozen=True)
class Guard:
    """`token`: what visitors must know, None on loopback; `names`: host names by which this server may be called,
    beside addresses and localhost."""

    token: str | None
    names: frozenset[str] = frozenset()
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    @property
    def form_word(self) -> str:
        """What forms of our own pages carry."""
        return self._derived("form")

    @property
    def cookie(self) -> str:
        """The name of the cookie. Ports share cookies, so servers side by side have names of their own."""
        return f"segprop-{self._derived('cookie')[:8]}"

    def _derived(self, what: str) -> str:
        return hmac.new(self.secret, what.encode(), hashlib.sha256).hexdigest()

    def knows_host(self, host: str | None) -> bool:
        """Tell whether the `Host` header names this server."""
        name = _host_name(host or "")
        if name in _LOOPBACK or name in self.names:
            return True
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def lets_in(self, headers: Mapping[str, str]) -> bool:
        """Tell whether a visitor has shown the token, or needs none."""
        if self.token is None:
            return True
        kind, _, shown = headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer" and self.is_token(shown.strip()):
            return True
        try:
            jar = SimpleCookie(headers.get("Cookie", ""))
        except CookieError:
            return False
        found = jar.get(self.cookie)
        return found is not None and _equal(found.value, self._derived("session"))

    def is_token(self, shown: str) -> bool:
        """Compare without telling by the time how much of it is right."""
        return self.token is not None and _equal(shown, self.token)

    def set_cookie(self) -> str:
        """Return the `Set-Cookie` header of a visitor who has shown the token. It goes along with links from elsewhere,
        such as those of a report, which has an origin of its own, and with no form."""
        return f"{self.cookie}={self._derived('session')}; HttpOnly; SameSite=Lax; Path=/"

    def from_our_page(self, headers: Mapping[str, str], word: str) -> bool:
        """Tell whether a form was sent by one of our own pages."""
        origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site")
        if origin is not None and urlsplit(origin).netloc.lower() != headers.get("Host", "").lower():
            return False
        if site is not None and site not in ("same-origin", "none"):
            return False
        return _equal(word, self.form_word)


def _equal(shown: str, known: str) -> bool:
    return hmac.compare_digest(shown.encode(errors="replace"), known.encode())


def _host_name(host: str) -> str:
    """Return the name or address in a `Host` header, without the port; "" where it is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".") if "@" not in host and "/" not in host else ""
    except ValueError:
        return ""
