"""Addresses that lead to one page, written in one way.

After RFC 3986, section 6, and what crawlers do: the scheme (http, https) and `www.` do not tell pages apart,
host and scheme are lower-cased, default ports, user names, fragments and a final dot or slash go, %41 is A
and %3a is %3A, dot segments are resolved, parameters are sorted and those that only follow a visitor
(utm_source, gclid, a session) go, so does a last index.html. Case in paths and parameters tells pages apart.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_FOLLOW = re.compile(
    r"(?:utm_\w+|gclid|dclid|fbclid|msclkid|yclid|igshid|mc_[ce]id|_ga|_gl|ref_src|spm|"
    r"phpsessid|jsessionid|sessionid|sid|aspsessionid\w*)$",
    re.IGNORECASE,
)
_INDEX = re.compile(r"/(?:index|default)\.(?:html?|php|aspx?|jsp)$", re.IGNORECASE)
_SESSION = re.compile(r";jsessionid=[^/?#]*", re.IGNORECASE)
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_PORTS = {"http": "80", "https": "443"}


def normalise(address: str) -> str:
    """The address without scheme, in one spelling; "" for what is no http or https address."""
    try:
        parts = urlsplit(address.strip())
        port = parts.port
        host = (parts.hostname or "").rstrip(".")
    except ValueError:  # such as a port that is no number
        return ""
    scheme = parts.scheme.lower()
    if scheme not in _PORTS or not host:
        return ""
    try:
        host = host.encode("idna").decode() if not host.isascii() else host
    except UnicodeError:
        return ""
    host = host.lower().removeprefix("www.")
    if port is not None and str(port) != _PORTS[scheme]:
        host = f"{host}:{port}"
    path = _INDEX.sub("/", _resolved(_SESSION.sub("", _escapes(parts.path))))
    kept = sorted(p for p in _escapes(parts.query).split("&") if p and not _FOLLOW.match(p.split("=", 1)[0]))
    query = "?" + "&".join(kept) if kept else ""
    return host + path.rstrip("/") + query


def _escapes(text: str) -> str:
    def plain(found: re.Match[str]) -> str:
        char = chr(int(found[1], 16))
        return char if char in _PLAIN else found[0].upper()

    spelt = "".join(
        c if c.isascii() and c != " " else "".join(f"%{b:02X}" for b in c.encode("utf-8", "replace"))
        for c in text
    )
    return _ESCAPE.sub(plain, spelt)


def _resolved(path: str) -> str:
    """Dot segments (section 5.2.4) and doubled slashes."""
    out: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            out = out[:-1]
        elif segment not in ("", "."):
            out.append(segment)
    return "/" + "/".join(out)
