"""Token ids in, text out, as they come: half characters and possible beginnings of stop texts are held
back."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """The text of one growing answer.

    `decode` maps ids to text. It is called on a short window only: what is new is the decoded window minus
    the decoded part of it that was already given, so tokenizers that treat the first token specially stay
    right. A window that ends in U+FFFD may be half a character and waits for more. So does one with nothing
    new in it (a special token): without the word before, the next one would lose its space."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._read = 0  # ids of the window whose text was given
        self._held = ""
        self._stopped = False

    def push(self, id: int) -> tuple[str, bool]:
        """Text that is safe to show now, and whether a stop text appeared (the text ends before it)."""
        self._ids.append(id)
        new = self._new_text()
        if not new or new.endswith("�"):
            return "", False
        self._ids, self._read = self._ids[self._read :], len(self._ids) - self._read
        return self._cut(new)

    def flush(self) -> tuple[str, bool]:
        """What was held back, at the end of the answer; nothing after a stop text."""
        if self._stopped:
            return "", True
        text, stopped = self._cut(self._new_text())
        if not stopped:
            text, self._held = text + self._held, ""
        self._ids, self._read = [], 0
        return text, stopped

    def _new_text(self) -> str:
        given = self._decode(self._ids[: self._read]) if self._read else ""
        return self._decode(self._ids)[len(given) :]

    def _cut(self, new: str) -> tuple[str, bool]:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held, self._stopped = "", True
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((k for k in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:k])), 0)
