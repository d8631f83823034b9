"""Files of the outside world to plain text: HTML, web archives, PDF, EPUB, Word, Markdown; and encodings.

Pure functions on bytes and text; caravan/data/formats joins them to files. What can hang or blow up on
hostile input (HTML, PDF, zip) runs in a process of its own with a clock and a memory limit: `workers`.
"""

from caravan.data.extract.html import Extracted, engines, extract, usable

__all__ = ["Extracted", "engines", "extract", "usable"]
