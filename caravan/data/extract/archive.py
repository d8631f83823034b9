"""Zip files that hold documents (EPUB, Word): members read with a limit on what they unpack to.

The sizes a zip file states about itself are not believed: reading stops at the limit. XML with a document
type of its own is refused, so that no entity can grow.
"""

from __future__ import annotations

import zipfile
import zlib
from xml.etree import ElementTree

from caravan.data.extract.problems import Unreadable

MEMBERS = 20_000
RATIO = 200
"""A member that unpacks to more than a megabyte and this many times its packed size is a bomb."""


class Archive:
    """A zip file opened for reading; every member together may unpack to `limit` bytes."""

    def __init__(self, path: str, limit: int) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
            self.names = set(self._zip.namelist())
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeError) as error:
            raise Unreadable(f"a zip file ({error})") from error
        if len(self.names) > MEMBERS:
            raise Unreadable(f"a zip file of at most {MEMBERS:,} members")
        self._left = limit
        self._limit = limit

    def read(self, name: str) -> bytes:
        """One member. Raises Unreadable if it is absent, encrypted, damaged or a bomb."""
        try:
            info = self._zip.getinfo(name)
            most = min(self._left, max(1 << 20, RATIO * info.compress_size))
            with self._zip.open(info) as file:
                data = file.read(most + 1)
        except KeyError as error:
            raise Unreadable(f"a member {name!r}") from error
        except RuntimeError as error:
            raise Unreadable("a zip file without a password") from error
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, zlib.error) as error:
            raise Unreadable(f"a sound member {name!r} ({error})") from error
        if len(data) > most:
            raise Unreadable(f"members that unpack to less than {RATIO} times their size ({name!r} does not)")
        self._left -= len(data)
        return data

    def xml(self, name: str) -> ElementTree.Element:
        """One member as XML."""
        data = self.read(name)
        if b"<!ENTITY" in data or (b"<!DOCTYPE" in data[:4096].upper() and b"[" in data[:4096]):
            raise Unreadable(f"XML without entities of its own in {name!r}")
        try:
            return ElementTree.fromstring(data)
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise Unreadable(f"sound XML in {name!r} ({error})") from error
