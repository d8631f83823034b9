"""RefinedWeb's corrections by line (Penedo et al. 2023, appendix G.2): menus, counters, buttons.

A line is flagged if it is mostly upper case, has digits alone, is a counter ("3 likes"), is one word, or
has at most ten words and matches a phrase at its start ("sign in"), at its end ("read more") or anywhere
("items in cart"). Flagged lines are removed; a page whose flagged lines hold more than 5 % of its words is
dropped. The authors printed examples of their phrases, not the list, and no limit for "mostly": this list
and one half are ours.

Legend: L lines, V words with letters.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from caravan.data.signals._view import DIGIT, UPPER, View, ratio

VERSION = 1
COLUMNS = {
    "refinedweb_flagged_words": "share of words in lines RefinedWeb would remove",
    "refinedweb_flagged_lines": "share of lines it would remove",
}
_SHORT = 10
_START = (
    "sign in", "sign up", "log in", "login", "register now", "subscribe", "share this", "click here",
    "skip to", "back to top", "follow us", "contact us", "about us", "download now", "buy now",
    "add to", "posted by",
    "filed under", "leave a reply", "leave a comment", "related posts", "copyright",
)  # fmt: skip
_END = (
    "read more", "learn more", "see more", "show more", "view more", "view all", "see all", "load more",
    "continue reading", "click here", "rights reserved", "to top", "to comment", "to reply", "next page",
)  # fmt: skip
"""Two words each."""
_ANYWHERE = ("items in cart", "item in cart", "your cart", "shopping cart", "privacy policy", "cookie policy")
_COUNTED = (
    "like", "likes", "comment", "comments", "share", "shares", "view", "views", "reply", "replies",
    "follower", "followers", "vote", "votes", "point", "points", "post", "posts", "photo",
    "photos", "item", "items",
    "result", "results", "tweet", "tweets", "download", "downloads",
)  # fmt: skip


@lru_cache(maxsize=1)
def _hashes() -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], np.ndarray]:
    start, end, anywhere = ([View([p]).hash_V for p in ps] for ps in (_START, _END, _ANYWHERE))
    return start, end, anywhere, View([" ".join(_COUNTED)]).hash_V


def signals(view: View) -> dict[str, np.ndarray]:
    flagged = flagged_lines(view)
    words = (view.line_last_L - view.line_first_L) * flagged
    return {
        "refinedweb_flagged_words": ratio(view.sum_lines(words), view.words_D),
        "refinedweb_flagged_lines": ratio(view.sum_lines(flagged), view.lines_D),
    }


def flagged_lines(view: View) -> np.ndarray:
    """bool [L]: lines RefinedWeb would remove."""
    words = view.line_last_L - view.line_first_L
    letters_to = np.concatenate([[0], np.cumsum(view.letters_W)])
    letters = letters_to[view.line_last_L] - letters_to[view.line_first_L]
    upper, digits = _per_line(view, UPPER), _per_line(view, DIGIT)
    flagged = (words == 1) | ((letters > 0) & ((2 * upper > letters) | (digits == letters)))
    plain_to = np.concatenate([[0], np.cumsum(view.has_letters_W)])
    first, last = plain_to[view.line_first_L], plain_to[view.line_last_L]
    size = last - first
    starts, ends, anywhere, counted = _hashes()
    short = np.flatnonzero((words <= _SHORT) & ~flagged & (size > 0))
    first, last, size = first[short], last[short], size[short]
    word = np.concatenate([view.hash_V, np.zeros(4, np.uint64)])
    hit = (size == 2) & (digits[short] > 0) & np.isin(word[first + 1], counted)
    few = np.flatnonzero(_among(word[first], starts))
    for phrase in starts:
        hit[few] |= (size[few] >= len(phrase)) & _reads(word, first[few], phrase)
    few = np.flatnonzero((size >= 2) & _among(word[np.maximum(last - 2, 0)], ends))
    for phrase in ends:
        hit[few] |= _reads(word, last[few] - 2, phrase)
    for phrase in anywhere:
        place = np.flatnonzero(word == phrase[0])
        place = place[_reads(word, np.minimum(place, len(word) - len(phrase)), phrase)]
        line = np.searchsorted(first, place, side="right") - 1
        inside = (line >= 0) & (place + len(phrase) <= last[line])
        hit[line[inside]] = True
    flagged[short[hit]] = True
    return flagged


def _among(word: np.ndarray, phrases: list[np.ndarray]) -> np.ndarray:
    """bool: whether a phrase may begin here."""
    first = np.unique([phrase[0] for phrase in phrases])
    return first[np.minimum(np.searchsorted(first, word), len(first) - 1)] == word


def _reads(word_V: np.ndarray, at: np.ndarray, phrase: np.ndarray) -> np.ndarray:
    """bool: whether the phrase stands at each place."""
    out = np.ones(len(at), np.bool_)
    for k in range(len(phrase)):
        out &= word_V[at + k] == phrase[k]
    return out


def _per_line(view: View, bit: int) -> np.ndarray:
    places = view.places(bit)
    return np.searchsorted(places, view.line_end_L) - np.searchsorted(places, view.line_start_L)
