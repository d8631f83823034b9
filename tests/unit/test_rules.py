"""model.rules: the mapping language, on numbers one can follow by eye."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caravan.model import rules
from caravan.model.rules import Rule
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, Spec
from caravan.types import UserError

TEXT = r"""
table @=m.l.{i} ~=m
prefix? m.
drop \.mask$
~.{wte,ln} -> {embed,norm}; @.{q,k,v} -> mix.qkv : cat
# a comment
@.up -> ffn.inp : T
"""


def spec(layers: int = 1, heads: int = 2, kv: int = 1, width: int = 2, rotary: int = 2) -> Spec:
    attn = Attn(n_head=heads, n_kv=kv, head_dim=width, rope=Rope(dim=rotary, interleaved=True))
    layer = Layer(attn=attn, ffn=FFN(kind="mlp", d_ff=3, act="relu"), norm=Norm())
    return Spec(vocab=5, d=heads * width, layers=(layer,) * layers, final_norm=Norm(), max_pos=8)


CANONICAL = ["embed.weight", "norm.weight", "norm.bias", "blocks.0.mix.qkv.weight", "blocks.0.ffn.inp.weight"]


def file(prefix: str = "m.") -> dict[str, torch.Tensor]:
    make = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))  # noqa: E731
    shapes = {"wte.weight": (5, 4), "ln.weight": (4,), "ln.bias": (4,), "l.0.q.weight": (4, 4),
              "l.0.k.weight": (2, 4), "l.0.v.weight": (2, 4), "l.0.up.weight": (4, 3)}  # fmt: skip
    return {prefix + name: make(*shape) for name, shape in shapes.items()}


def load(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], bool]:
    table = rules.parse(TEXT)
    return rules.load(
        table, rules.plan(table, spec(), CANONICAL), tensors.keys(), tensors.__getitem__, "somewhere"
    )


def test_braces_prefixes_and_comments() -> None:
    table = rules.parse(TEXT)
    assert table.prefix == "m." and table.drops == (r"\.mask$",)
    assert table.rules == (
        Rule(("m.wte",), "embed"),
        Rule(("m.ln",), "norm"),
        Rule(("m.l.{i}.q", "m.l.{i}.k", "m.l.{i}.v"), "blocks.{i}.mix.qkv", ("cat",)),
        Rule(("m.l.{i}.up",), "blocks.{i}.ffn.inp", ("T",)),
    )


@pytest.mark.parametrize("text", ["a b", "-> x", "{a,b,c} -> {d,e}"])
def test_malformed_rules_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        rules.parse(text)


def test_load_joins_and_transposes() -> None:
    tensors = file()
    loaded, bare = load(tensors)
    assert not bare and set(loaded) == set(CANONICAL)
    want = torch.cat([tensors[f"m.l.0.{x}.weight"] for x in "qkv"])
    assert torch.equal(loaded["blocks.0.mix.qkv.weight"], want)
    assert torch.equal(loaded["blocks.0.ffn.inp.weight"], tensors["m.l.0.up.weight"].T)


@pytest.mark.parametrize("prefix", ["m.", ""])
def test_export_is_load_backwards(prefix: str) -> None:
    tensors = file(prefix)
    loaded, bare = load(tensors)
    assert bare == (prefix == "")
    table = rules.parse(TEXT)
    back = rules.export(table, rules.plan(table, spec(), CANONICAL), loaded, bare)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_missing_and_unknown_tensors_are_named() -> None:
    tensors = file()
    del tensors["m.l.0.k.weight"]
    with pytest.raises(UserError, match=r"'m\.l\.0\.k\.weight' is missing"):
        load(tensors)
    with pytest.raises(UserError, match=r"'m\.l\.0\.q\.bias' has no place"):
        load(file() | {"m.l.0.q.bias": torch.zeros(4)})
    load(file() | {"m.l.0.mask": torch.zeros(4)})  # dropped


def test_a_canonical_name_without_rule_is_a_programmers_mistake() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.out"):
        rules.plan(rules.parse(TEXT), spec(), ["blocks.0.ffn.out.weight"])


def step(op: str, s: Spec) -> rules.Step:
    return rules.Step("blocks.0.mix.qkv.weight", ("x",), (op,), s.layers[0])


def test_grouped_rows_by_hand() -> None:
    # two groups of (2 queries, key, value), head width 1
    rows = torch.tensor([[10], [11], [20], [30], [12], [13], [21], [31]])
    got = rules.forwards([rows], step("grp", spec(heads=4, kv=2, width=1, rotary=1)))
    assert got.flatten().tolist() == [10, 11, 12, 13, 20, 21, 30, 31]


def test_interleaved_rows_by_hand() -> None:
    # one query, key and value head of width 6 of which 4 are rotary
    rows = torch.arange(18)[:, None]
    got = rules.forwards([rows], step("rope", spec(heads=1, kv=1, width=6, rotary=4))).flatten().tolist()
    assert got == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([2, 4, 6]),
    st.sampled_from(["T", "grp", "rope", "cat"]),
)
def test_every_op_undoes_itself(group: int, kv: int, width: int, op: str) -> None:
    s = spec(heads=group * kv, kv=kv, width=width)
    rows = torch.randn((group + 2) * kv * width, 3)
    one = step(op, s)
    if op == "cat":
        one = rules.Step(one.target, ("q", "k", "v"), one.ops, one.layer)
        sources = list(rows.split([group * kv * width, kv * width, kv * width]))
    else:
        sources = [rows]
    back = rules.backwards(rules.forwards(sources, one), one)
    assert all(torch.equal(a, b) for a, b in zip(back, sources, strict=True))
