"""Public IP addresses, version 4 and 6; neither version numbers nor sections, and no private networks."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from caravan.data.pii import found_at

LABEL, PRIORITY, VERSION = "IP_ADDRESS", 30, 2
HINT = r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]|[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]"
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_V4 = re.compile(rf"(?<![A-Za-z0-9.])(?:{_OCTET}\.){{3}}{_OCTET}(?![A-Za-z0-9]|\.[0-9])")
_V6 = re.compile(r"(?<![A-Za-z0-9:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,35}(?![A-Za-z0-9:])")
_NOT_AFTER = re.compile(
    r"(?:\b(?:v|ver|version|section|sec|chapter|clause|figure|table|release|rev|build|rfc|oid)\.?|§|第|版本)\s*$",
    re.IGNORECASE,
)
_V4_START = re.compile(r"[0-9](?<![A-Za-z0-9.].)")
_V6_START = re.compile(r"[23](?<![A-Za-z0-9:.].)")


def find(text: str) -> Iterator[tuple[int, int]]:
    for found in found_at(_V4_START, _V4, text):
        before = text[max(0, found.start() - 12) : found.start()]
        if ipaddress.ip_address(found[0]).is_global and not _NOT_AFTER.search(before):
            yield found.span()
    if ":" not in text:
        return
    for found in found_at(_V6_START, _V6, text):
        try:
            good = ipaddress.ip_address(found[0]).is_global
        except ValueError:
            continue
        if good:
            yield found.span()
