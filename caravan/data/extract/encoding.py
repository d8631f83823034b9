"""Bytes to text: byte order mark, declared charset, UTF-8, then a guess among the encodings of the old web.

A guess is a measurement: a candidate must decode the sample without an error, and enough of what comes out
must be letters that its language uses most (kana, the commonest Han characters, Hangul syllables, Cyrillic
small letters). Between two candidates the one with the larger share wins; below its floor none does, and the
caller is told so instead of getting rubbish.

Labels follow the WHATWG Encoding Standard where it matters: gb2312 and gbk mean gb18030, iso-8859-1 and
ascii mean windows-1252, shift_jis means windows-31j, euc-kr means windows-949.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

_LABELS = {
    "gb2312": "gb18030", "gbk": "gb18030", "gb-2312": "gb18030", "x-gbk": "gb18030", "cp936": "gb18030",
    "iso-8859-1": "cp1252", "latin1": "cp1252", "latin-1": "cp1252", "ascii": "cp1252", "us-ascii": "cp1252",
    "shift_jis": "cp932", "shift-jis": "cp932", "sjis": "cp932", "x-sjis": "cp932", "windows-31j": "cp932",
    "euc-kr": "cp949", "ks_c_5601-1987": "cp949", "big5": "big5hkscs", "big5-hkscs": "big5hkscs",
    "x-big5": "big5hkscs", "iso-8859-9": "cp1254", "tis-620": "cp874", "utf8": "utf-8",
}  # fmt: skip
_HANS = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里如家成都学动现当"
    "没方自由权利应第条任何法律"
)
_HANT = (
    "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過發後作裡如家成都學動現當"
    "沒方自由權利應第條任何法律"
)
_HANGUL = "이다는의에을를가하고지은로기사한인도리대자서아어시나해그과있수정보일라만부것게었으여권모든장제조유"
_SCRIPT = 0.5
"""Share of all letters that must be beyond ASCII where a language does not write in Latin letters."""
_SETS: tuple[tuple[str, str, float, float], ...] = (
    # codec, letters its language uses most, their least share of what is not ASCII, that share of all letters
    ("cp932", "ぁ-んァ-ヶー", 0.3, 0.0),
    ("euc_jp", "ぁ-んァ-ヶー", 0.3, 0.0),
    ("gb18030", _HANS, 0.12, 0.0),
    ("big5hkscs", _HANT, 0.12, 0.0),
    ("cp949", _HANGUL, 0.2, 0.0),
    ("cp1251", "оеаинтсрвлкмдпуіяы", 0.5, _SCRIPT),
    ("koi8_r", "оеаинтсрвлкмдпуяы", 0.5, _SCRIPT),
    ("cp1253", "αοιετσνηυρπκμλςάόίέή", 0.6, _SCRIPT),
    ("cp1255", "יוהלארמבתשנדםחק", 0.6, _SCRIPT),
    ("cp1256", "المنيوترهبعدقفسكح", 0.6, _SCRIPT),
    ("cp874", "านรอกเงมยลวดทสตะคบป่้ีัิ", 0.6, _SCRIPT),
    ("cp1254", "ışğİŞĞ", 0.35, 0.0),
    ("cp1250", "łęąśżćńźŁŚŻěščřžůťďň", 0.65, 0.0),
)
_HIGH = re.compile("[^\x00-\x7f]")
_ASCII_LETTER = re.compile("[A-Za-z]")
_WESTERN = re.compile(
    "(?<=[A-Za-z])[À-ÖØ-öø-ÿŒœŠšŽžŸ]|[À-ÖØ-öø-ÿŒœŠšŽžŸ](?=[a-z])|[–—‘’“”•…€£©®°«»·§¿¡ªº²³½\xa0]"
)
_META = re.compile(rb"<meta[^>]{0,500}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]{2,40})", re.I)
_XML = re.compile(rb"^\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([A-Za-z0-9_.-]{2,40})", re.I)
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_CUT = {"utf-8": 3, "gb18030": 3}
SAMPLE = 1 << 16


@dataclass(frozen=True, slots=True)
class Decoded:
    """A text, the encoding it was read in and how that was known."""

    text: str
    encoding: str
    reason: str
    """"a byte order mark", "declared", "valid", "guessed" or, where nothing fits, "unknown"."""
    damaged: int = 0
    """Places that are not valid in the encoding; each became U+FFFD."""


def codec_of(label: str | None) -> str | None:
    """Python's name for a charset label of the web; None for what is none, or no text encoding."""
    key = (label or "").strip().strip("\"'").lower()
    name = _LABELS.get(key, key)
    try:
        found = codecs.lookup(name) if name else None
    except (LookupError, ValueError):
        return None
    if (
        found is None
        or not found._is_text_encoding
        or found.name in ("idna", "punycode", "utf-7", "undefined")
    ):
        return None
    if found.name in ("unicode_escape", "raw_unicode_escape", "unicode-escape", "raw-unicode-escape"):
        return None
    return found.name


def mark(sample: bytes) -> str | None:
    """The encoding a byte order mark at the beginning stands for."""
    return next((name for bom, name in _BOMS if sample.startswith(bom)), None)


def declared(head: bytes) -> str | None:
    """The charset an HTML or XML file declares in its first 4 KB."""
    found = _XML.search(head[:4096]) or _META.search(head[:4096])
    name = codec_of(found[1].decode("ascii")) if found else None
    # The declaration was read as ASCII, so it cannot be true (HTML standard, prescan, step 2.14).
    return "utf-8" if name and name.startswith(("utf-16", "utf-32")) else name


def guess(sample: bytes) -> tuple[str | None, str]:
    """(encoding, reason) of bytes that declare nothing; None if no candidate explains them.

    `sample` may be cut inside a character. Latin-1 (as windows-1252) is believed only if its accented letters
    stand inside Latin words.
    """
    if (found := mark(sample)) is not None:
        return found, "a byte order mark"
    if _decodes(sample, "utf-8"):
        return ("utf-8", "valid") if b"\0" not in sample else (None, "unknown")
    if b"\0" in sample:
        return None, "unknown"
    spoilt = sample.decode("utf-8", "replace")
    bad = spoilt.count("\ufffd")
    if len(_HIGH.findall(spoilt)) - bad > 4 * bad:
        return "utf-8", "valid but for a few bytes"
    best, most = None, 1.0
    for name, usual, floor, script in _SETS:
        text = _decodes(sample, name)
        high = len(_HIGH.findall(text or ""))
        if not text or not high or high < script * (high + len(_ASCII_LETTER.findall(text))):
            continue
        share = len(re.findall(f"[{usual}]", text)) / high / floor
        if share > most:
            best, most = name, share
    if best is None:
        text = sample.decode("cp1252", "replace")
        high = len(_HIGH.findall(text))
        if len(_WESTERN.findall(text)) >= 0.8 * high and "\ufffd" not in text:
            best = "cp1252"
    return (best, "guessed") if best else (None, "unknown")


def _decodes(sample: bytes, name: str) -> str | None:
    """The text, if all of the sample is valid but perhaps a character cut at its end."""
    try:
        return sample.decode(name)
    except UnicodeDecodeError as error:
        if len(sample) - error.start > _CUT.get(name, 1) or error.start == 0:
            return None
        return sample[: error.start].decode(name)


def decode(data: bytes, charset: str | None = None, html: bool = False) -> Decoded:
    """All of `data` as text. `charset` is what a header says; with `html` the page's own declaration counts.

    Order: byte order mark, header, page, UTF-8 if it is valid, guess; at last windows-1252 with the reason
    "unknown". A declaration that does not fit loses to valid UTF-8. Never raises; invalid places are counted.
    """
    sample = data[:SAMPLE]
    name, reason = mark(sample), "a byte order mark"
    if name is None:
        name, reason = codec_of(charset) or (declared(data) if html else None), "declared"
        if name is not None and name != "utf-8":
            try:
                return Decoded(data.decode(name), name, reason)
            except (UnicodeError, ValueError):
                name = None  # let valid UTF-8 win before damage is counted
                found = codec_of(charset) or declared(data)
                guessed, why = guess(sample)
                name, reason = (guessed, why) if guessed == "utf-8" else (found, "declared")
    if name is None or (name == "utf-8" and reason == "declared" and _decodes(sample, "utf-8") is None):
        guessed, why = guess(sample)
        name, reason = (guessed, why) if guessed else (name or "cp1252", reason if name else "unknown")
    text = data.decode(name, "replace")
    return Decoded(text, name, reason, text.count("\ufffd"))


# What UTF-8 looks like when it was once decoded as windows-1252 or Latin-1: a lead byte shown as a letter,
# followed by what stands for continuation bytes.
_TWICE = re.compile(
    "[ÂÃÄÅÐÑÎÏ×ØÙÚÛ][\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|[à-ïâ][\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]{2}"
)


def mojibake(text: str) -> float:
    """Share of characters that belong to UTF-8 decoded in the wrong encoding (Ã© for é); 0 for clean text.

    Looks at the first 20,000 characters. Real French, Portuguese or Vietnamese stays below 0.001.
    """
    head = text[:20_000]
    return sum(map(len, _TWICE.findall(head))) / max(1, len(head))
