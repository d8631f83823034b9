"""docs/families.md, made from caravan/model/families and the cases beside this file.

    python -m tests.families.table      write it

A test holds the page and the code equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from caravan.model import families
from tests import families as tiny
from tests.families import Case

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

HEAD = """# Model families

Made by `python -m tests.families.table`; edit `caravan/model/families` and `tests/families` instead.

A family is one file in `caravan/model/families`: it reads `config.json` of either generation of
transformers, and its weight rules name every tensor of its files, in both directions. What the columns mean:

- **proven against**: the class of transformers whose tiny random models ours equals, or *oracle*, a slow
  model written apart from ours, where no class exists. max|difference| / std of the logits in fp32 stays
  below 5e-5 unless a case says otherwise, exported tensors are the same bits, both spellings of
  `config.json` give the same model, and a deliberately wrong knob is noticed.
- **opens**: transformers opens what we export and says the same.
- **decode**: drawing token by token through our engine gives the log-probabilities of one pass.
- **packed, padded**: texts end to end in one flat batch are texts alone; rows left-padded in transformers are
  our ragged segments.
- **one graph**: `torch.compile(fullgraph=True)` takes the whole model and says the same, and for one case per
  mixer, hybrid and encoder forward and backward pass (checked by `pytest -m slow`). The backend is
  `aot_eager`: it traces forward and backward as inductor does, but writes no kernels, which are torch's
  business and take minutes per model.

Every family that writes text also goes through the stages (`tests/contracts/test_family_stages.py`, by
`pytest -m slow`): `merge` and a training rate of zero hand it back bit for bit; `sft` in fp32 and bf16, with
AdamW, Muon and layers computed again, `reward`, `prefer`, `rl` in fp32 and bf16, `evaluate`, `quantize` to 8
and 4 bits, `grow`, `serve` and `inspect` take it; and what comes out is opened by the class or read by the
oracle, which says what we say, every word of a served greedy answer included.

`yes` means every case; a number points to the note that says why a case leaves the check out.
"""

CHECKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("opens", ("reload",)),
    ("decode", ("decode",)),
    ("packed, padded", ("packing", "left_pad")),
    ("one graph", ("compile",)),
)


def references(cases: Sequence[Case]) -> str:
    """What the cases of a family are compared with."""
    found: dict[str, list[str]] = {}
    for case in cases:
        against = "oracle" if case.hf is None else f"`{case.hf.reference}`"  # type: ignore[attr-defined]
        found.setdefault(against, []).append("" if case.disguise is None else case.name)
    said = []
    for against, renamed in found.items():
        which = "" if all(renamed) else f" ({', '.join(filter(None, renamed))})"
        said.append(against + (f" with its files renamed{which}" if any(renamed) else ""))
    return ", ".join(said)


def known(family: ModuleType) -> str:
    """Released checkpoints and other model_types of a family."""
    named = ", ".join(getattr(family, "CHECKPOINTS", ()))
    aliases = ", ".join(f"`{alias}`" for alias in getattr(family, "ALIASES", ()))
    return "; ".join(part for part in (named, f"also {aliases}" if aliases else "") if part)


def answers(cases: Sequence[Case], flags: Sequence[str], notes: list[str]) -> str:
    """yes, or the numbers of the notes that say why not."""
    reasons: dict[str, None] = {}
    for case in cases:
        for flag in flags:
            value = getattr(case, flag)
            if flag == "reload" and case.hf is None:
                value = "transformers has no class for it"
            elif flag == "left_pad" and case.hf is None:
                value = True  # nothing to pad: an oracle reads one text
            if value is not True:
                reasons[str(value)] = None
    for reason in reasons:
        if reason not in notes:
            notes.append(reason)
    numbers = ", ".join(str(notes.index(reason) + 1) for reason in reasons)
    every = all(any(getattr(case, f) is not True for f in flags) or
                ("reload" in flags and case.hf is None) for case in cases)  # fmt: skip
    return "yes" if not numbers else f"no ({numbers})" if every else f"yes, but ({numbers})"


def page() -> str:
    """The text of docs/families.md."""
    notes: list[str] = []
    rows = []
    for name in families.names():
        family = families.find(name)
        cases = [case for owner, case in tiny.cases() if owner == name]
        cells = [f"`{name}`", known(family), references(cases), ", ".join(case.name for case in cases)]
        cells += [answers(cases, flags, notes) for _, flags in CHECKS]
        rows.append("| " + " | ".join(cells) + " |")
    titles = ["family", "checkpoints", "proven against", "cases", *(title for title, _ in CHECKS)]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles), *rows, "", "Notes", ""]
    lines += [f"{i}. {note}" for i, note in enumerate(notes, 1)]
    return HEAD + "\n" + "\n".join(lines) + "\n"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
