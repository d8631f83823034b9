"""Records with their loss mask: coloured in a terminal, or as one self-contained HTML page.

What carries loss is green, special tokens are bold, what is cut off behind the context is struck out. Tokens
take turns in two shades, so that their borders show. Data are untrusted: control characters are written out,
HTML is escaped, the page holds no script and loads nothing.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from caravan.data.peek import Look, Packing, Piece, visible

STYLES = {
    (False, False): ("", "on grey15"),
    (True, False): ("black on green3", "black on green4"),
    (False, True): ("bold cyan", "bold cyan"),
    (True, True): ("bold black on green1", "bold black on green1"),
}
"""(trained, special) -> rich styles of even and odd tokens."""


def spans(look: Look) -> Iterator[tuple[str, str]]:
    """(text, rich style) of every token."""
    for at, piece in enumerate(look.pieces):
        style = STYLES[piece.trained, piece.special][at % 2]
        yield visible(piece.text), f"{style} strike dim".strip() if piece.cut else style


def plain(look: Look) -> str:
    """For a pipe: what carries loss stands between ⟦ and ⟧, what is cut off between ⟨cut: and ⟩."""
    text, inside, cut = [], False, False
    for piece in look.pieces:
        if piece.trained != inside:
            text.append("⟦" if piece.trained else "⟧")
            inside = piece.trained
        if piece.cut and not cut:
            text.append("⟨cut: ")
            cut = True
        text.append(visible(piece.text))
    return "".join(text) + ("⟧" if inside else "") + ("⟩" if cut else "")


def summary(look: Look) -> str:
    """One line: size, what carries loss, what was cut off."""
    if look.problem:
        return f"{look.title}: cannot be rendered: {look.problem}"
    share = look.trained / max(1, look.tokens)
    words = f"{look.title}: {look.tokens} tokens, {look.trained} with loss ({share:.0%})"
    if not look.kept:
        return words + ", left out: no answer ends within the context"
    cut = look.tokens - look.kept
    return words + (f", cut to {look.kept} (the last {cut} do not fit)" if cut else "")


def packed(packing: Packing) -> str:
    """One line: how the sequences fill contexts."""
    words = (
        f"{packing.sequences} sequences, {packing.tokens:,} tokens, fill {packing.contexts} contexts of "
        f"{packing.context:,} to {packing.filled:.0%}"
    )
    return words + f"; {packing.truncated} cut, {packing.lost} left out"


_CSS = """
:root { color-scheme: light dark; --loss: #bfe8c5; --loss2: #a5dcae; --odd: #0000000d; --line: #8886;
  --special: #00559e }
@media (prefers-color-scheme: dark) { :root { --loss: #1d5a2b; --loss2: #22672f; --odd: #ffffff14;
  --special: #b5deff } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1rem; margin: 2rem 0 .4rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 6px;
  padding: .7rem; font: 13px/1.6 ui-monospace, monospace }
span:nth-child(odd) { background: var(--odd) }
.m { background: var(--loss) !important } .m:nth-child(odd) { background: var(--loss2) !important }
.s { font-weight: bold; color: var(--special) } .c { text-decoration: line-through; opacity: .55 }
.bad { color: #c22 } ul { padding-left: 1.2rem }
"""


def page(
    title: str, about: Sequence[str], records: Sequence[Sequence[Look]], problems: Sequence[str], packing: str
) -> str:
    """One HTML page. `about`: lines on what was read and why; `records`: the sequences of each record."""
    legend = (
        '<p><span class="m">with loss</span> · <span class="s">special token</span> · '
        '<span class="c">cut off</span> · everything else is read without loss</p>'
    )
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_escaped(title)}</title><style>{_CSS}</style></head><body>",
        f"<h1>{_escaped(title)}</h1><ul>",
        *(f"<li>{_escaped(line)}</li>" for line in [*about, packing]),
        f"</ul>{legend}",
    ]
    for found in records:
        for look in found:
            kind = ' class="bad"' if look.problem else ""
            parts.append(f"<h2{kind}>{_escaped(summary(look))}</h2>")
            if look.pieces:
                parts.append(f"<pre>{''.join(map(_span, look.pieces))}</pre>")
    if problems:
        parts.append('<h2 class="bad">not read</h2><ul>')
        parts += [f"<li>{_escaped(problem)}</li>" for problem in problems]
        parts.append("</ul>")
    return "".join(parts) + "</body></html>\n"


def _escaped(text: str) -> str:
    return html.escape(visible(text))


def _span(piece: Piece) -> str:
    names = [
        name for name, on in (("m", piece.trained), ("s", piece.special), ("c", piece.cut)) if on
    ]  # fmt: skip
    known = f' class="{" ".join(names)}"' if names else ""
    return f"<span{known}>{_escaped(piece.text)}</span>"
