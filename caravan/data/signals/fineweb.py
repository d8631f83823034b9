"""What FineWeb added (Penedo et al. 2024): end marks of lines, short lines, copied lines, lists.

Found on web pages: a book wrapped by hand at 70 characters breaks the rule on end marks.
"""

from __future__ import annotations

import numpy as np

from caravan.data.signals._view import View, one_of, ratio

VERSION = 1
COLUMNS = {
    "fineweb_ended_lines": "share of lines that end in . ? ! \" '",
    "fineweb_short_lines": "share of lines of at most 30 characters",
    "fineweb_copied_line_chars": "characters of copied lines among those that are no newline",
    "fineweb_newlines": "newlines per word",
}
_END = ".?!\"'"
_SHORT = 30


def signals(view: View) -> dict[str, np.ndarray]:
    newlines = view.occurrences(10)
    short = view.line_end_L - view.line_start_L <= _SHORT
    return {
        "fineweb_ended_lines": ratio(view.sum_lines(one_of(view.last_code_L(), _END)), view.lines_D),
        "fineweb_short_lines": ratio(view.sum_lines(short), view.lines_D),
        "fineweb_copied_line_chars": ratio(view.copied_lines[:, 1], view.chars_D - newlines),
        "fineweb_newlines": ratio(newlines, view.words_D),
    }
