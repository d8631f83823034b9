"""Chinese: characters instead of words, its own punctuation, scripts and boilerplate.

English rules count words and stop words, which a text without spaces has not. Here the unit is the Han
character: how much of a document is punctuation, how long it goes without any (lists of keywords), how much
of it repeats (4-grams and 10-grams of characters, as Gopher's of words), how many lines are short or
unfinished, how many are boilerplate of Chinese web pages, and whether it is written in traditional or
simplified characters. A character counts as simplified if GB 2312 has it and Big5 has not, as traditional
if the frequent half of Big5 has it and GB 2312 has not. Documents with fewer than ten Han characters get 0
throughout.

Legend: D documents, H Han characters, L lines.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from caravan.data.signals._view import HAN, MARK, SPACE, View, one_of, ratio
from caravan.data.signals.repetition import covered, follow, most_frequent, repeated

VERSION = 1
COLUMNS = {
    "zh_chars": "Han characters",
    "zh_mark_share": "punctuation and symbols among characters that are no white space",
    "zh_longest_clause": "longest run of characters without punctuation or white space",
    "zh_top_4gram": "Han characters of the most frequent 4-gram among all, 1 at most",
    "zh_repeated_10grams": "Han characters inside repeated 10-grams among all",
    "zh_short_lines": "share of lines of at most 10 characters",
    "zh_ended_lines": "share of lines that end in an end mark (。！？…；： or their closing quotes)",
    "zh_boilerplate_lines": "share of lines of at most 40 characters with a phrase of web boilerplate",
    "zh_simplified": "characters only simplified writing has, among Han characters",
    "zh_traditional": "characters only traditional writing has, among Han characters",
}
_END = "。！？…；：.!?;:”’」』）》】\"'"
_BOILERPLATE = re.compile(
    "版权所有|版權所有|ICP备|ICP備|公网安备|请登录|立即登录|立即注册|免费注册|点击(?:进入|查看|下载|这里|加载)|"
    "上一篇|下一篇|上一页|下一页|返回(?:首页|顶部|列表)|关注我们|扫码|扫一扫|微信公众号|转载请|未经授权|未經授權|"
    "相关(?:阅读|文章|推荐|链接)|热门(?:推荐|文章|标签)|友情链接|网站地图|联系我们|免责声明|责任编辑|"
    "加入收藏|分享到|展开全部|查看更多|阅读全文|客服热线|购物车|在线咨询"
)


@lru_cache(maxsize=1)
def _writing() -> np.ndarray:
    """uint8 by code point below 0x10000: 1 simplified only, 2 traditional only."""
    out = np.zeros(0x10000, np.uint8)
    for code in range(0x4E00, 0xA000):
        char = chr(code)
        try:
            big5 = char.encode("big5")
        except UnicodeEncodeError:
            big5 = b""
        try:
            simple = bool(char.encode("gb2312"))
        except UnicodeEncodeError:
            simple = False
        if simple and not big5:
            out[code] = 1
        elif big5 and not simple and b"\xa4\x40" <= big5 <= b"\xc6\x7e":
            out[code] = 2
    return out


def signals(view: View) -> dict[str, np.ndarray]:
    han = view.count(HAN)
    out = {name: np.zeros(len(view), np.float32) for name in COLUMNS}
    out["zh_chars"], out["zh_longest_clause"] = han, np.zeros(len(view), np.int64)
    if not (han >= 10).any():
        return out
    place_H = view.places(HAN)
    length_L = view.line_end_L - view.line_start_L
    kind = _writing()[np.minimum(view.codes_N[place_H], 0xFFFF)]
    made = {
        "zh_mark_share": ratio(view.count(MARK), view.chars_D - view.count(SPACE)),
        "zh_longest_clause": _longest_clause(view),
        "zh_short_lines": ratio(view.sum_lines(length_L <= 10), view.lines_D),
        "zh_ended_lines": ratio(view.sum_lines(one_of(view.last_code_L(), _END)), view.lines_D),
        "zh_boilerplate_lines": ratio(_boilerplate(view, han), view.lines_D),
        "zh_simplified": ratio(view.inside(place_H[kind == 1]), han),
        "zh_traditional": ratio(view.inside(place_H[kind == 2]), han),
        **_repetition(view, place_H, han),
    }
    return out | {name: np.where(han >= 10, values, 0).astype(values.dtype) for name, values in made.items()}


def _longest_clause(view: View) -> np.ndarray:
    """int64 [D]: the longest stretch between two marks or white spaces, or the ends of the text."""
    breaks = view.places(MARK | SPACE)  # the separators between documents are among them
    gaps = np.diff(np.concatenate([[-1], breaks])) - 1
    first = np.searchsorted(breaks, view.start_D)
    return np.maximum.reduceat(gaps, first) if len(first) else np.zeros(0, np.int64)


def _boilerplate(view: View, han: np.ndarray) -> np.ndarray:
    """int64 [D]: short lines with a phrase of boilerplate."""
    out = np.zeros(len(view), np.int64)
    for d in np.flatnonzero(han >= 10).tolist():
        if _BOILERPLATE.search(view.texts[d]):
            out[d] = sum(
                1 for line in view.texts[d].split("\n") if len(line) <= 40 and _BOILERPLATE.search(line)
            )
    return out


def _repetition(view: View, place_H: np.ndarray, han: np.ndarray) -> dict[str, np.ndarray]:
    document_H = np.repeat(np.arange(len(view)), han)
    fours = np.flatnonzero(document_H[3:] == document_H[:-3]) if len(document_H) > 3 else place_H[:0]
    key = document_H[fours].astype(np.uint64)
    with np.errstate(over="ignore"):
        for k in range(4):
            key = (key ^ view.codes_N[place_H[fours + k]]) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(32)
        key *= np.uint64(0xFF51AFD7ED558CCD)
    four = repeated(fours, key)
    eight = follow(four, 4)
    ten = follow(eight, 2)
    most = most_frequent(four, 4, document_H, np.arange(len(place_H) + 1), len(view))
    one = np.ones(len(place_H), np.int64)
    ranges = np.concatenate([[0], np.cumsum(han)])
    return {
        "zh_top_4gram": np.minimum(ratio(most, han), 1),
        "zh_repeated_10grams": ratio(covered(ten, 10, one, ranges), han),
    }
