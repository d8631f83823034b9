"""model.rules: the mapping language, on numbers one can follow by eye."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caravan.model import families, rules
from caravan.model.rules import Rule
from caravan.model.spec import FFN, MLA, Attn, Layer, MoE, Norm, Rope, Spec
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
    st.sampled_from(["T", "grp", "rope", "cat", "mp4qvk"]),
)
def test_every_op_undoes_itself(group: int, kv: int, width: int, op: str) -> None:
    if op == "mp4qvk":
        group, kv = 1, 4 * kv
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


# ------------------------------------------------------------------------------------ inheritance and guards


def targets(text: str, facts: set[str] | None = None) -> dict[str, tuple[str, ...]]:
    """target -> sources of every rule whose guard holds."""
    return {r.target: r.sources for r in rules.parse(text).rules if r.holds(facts or set())}


BASE = """
table base @=m.{i} ~=m
prefix? m.
drop old
~.wte -> embed; ~.ln -> norm; @.mlp.up -> ffn.inp; @.n1 -> n1; @.n2 -> n2
"""


def test_a_table_builds_on_another() -> None:
    text = BASE + "table derived like base @=x.{i} s/.mlp./.ff./\n- norm; - n2; @.other -> n1"
    table = rules.parse(text)
    derived = {r.target: r.sources for r in table.rules[5:]}
    assert derived == {
        "embed": ("m.wte",),
        "blocks.{i}.ffn.inp": ("x.{i}.ff.up",),
        "blocks.{i}.n1": ("x.{i}.other",),
    }
    assert table.prefix == "m." and table.drops == ("old",)


def test_drops_are_replaced_when_said_again() -> None:
    derived = rules._drafts(BASE + "table derived like base\ndrop new")["derived"]
    assert rules._resolved(derived).drops == ("new",)


def test_a_family_is_a_base() -> None:
    table = rules.of(families.find("gemma2"))
    assert table.sources("blocks.{i}.p1") == ("model.layers.{i}.post_attention_layernorm",)
    assert table.sources("blocks.{i}.mix.o") == ("model.layers.{i}.self_attn.o_proj",)
    assert table.sources("nothing") == ()


def test_guards_choose_rules() -> None:
    text = "table @=m ~=m\n[pre] @.n -> n1; [not pre] @.n -> p1; [par2] @.a -> n2"
    assert set(targets(text, {"pre"})) == {"blocks.{i}.n1"}
    assert set(targets(text, {"par2"})) == {"blocks.{i}.p1", "blocks.{i}.n2"}
    assert rules.predicates(spec()) == {"pre", "seq"}


def test_a_familys_own_predicates_count() -> None:
    text = "table @=m ~=m\n[mine] ~.a -> embed; [not mine] ~.b -> embed"
    for mine in (True, False):
        table = rules.parse(text, lambda spec, mine=mine: {"mine"} if mine else set())
        (step,) = rules.plan(table, spec(), ["embed.weight"])
        assert step.sources == (("m.a.weight",) if mine else ("m.b.weight",))


def test_targets_may_live_elsewhere() -> None:
    text = "table @=enc.{i} ~=enc => enc.blocks.{i}\n@.q -> a.q; ~.norm -> enc.norm"
    assert set(targets(text)) == {"enc.blocks.{i}.a.q", "enc.norm"}
    (step,) = rules.plan(rules.parse(text), spec(layers=2), ["enc.blocks.1.a.q.weight"])
    assert step.sources == ("enc.1.q.weight",)


@pytest.mark.parametrize("text", ["a -> b : spin", "table derived like nobody", "- a\n{a,b} -> {c,d,e}"])
def test_more_malformed_text(text: str) -> None:
    with pytest.raises((ValueError, UserError)):
        rules.parse(text)


# ------------------------------------------------------------------------------------ experts, heads, latents


def layer_of(**fields: object) -> Layer:
    attn = Attn(n_head=4, n_kv=2, head_dim=4, rope=Rope(dim=2, interleaved=True))
    moe = FFN(kind="moe", d_ff=3, act="silu", moe=MoE(n_expert=3, top_k=2, d_ff=3))
    return Layer(**{"attn": attn, "ffn": moe, "norm": Norm(), **fields})  # type: ignore[arg-type]


def round_trip(text: str, name: str, layer: Layer, file: dict[str, torch.Tensor]) -> torch.Tensor:
    """Load one canonical tensor, check that export gives the file back, and return it."""
    s = Spec(vocab=5, d=4, layers=(layer,), final_norm=None, max_pos=8)
    table = rules.parse("table @=m.{i} ~=m\n" + text)
    steps = rules.plan(table, s, [name])
    loaded, _ = rules.load(table, steps, file.keys(), file.__getitem__, "here")
    back = rules.export(table, steps, loaded)
    assert back.keys() == file.keys() and all(torch.equal(back[k], file[k]) for k in file)
    return loaded[name]


def test_experts_are_stacked_and_joined() -> None:
    file = {f"m.0.x.{e}.{w}.weight": torch.full((2, 4), 10.0 * e + (w == "up")) for e in range(3) for w in
            ("gate", "up")}  # fmt: skip
    got = round_trip("@.x.{e}.{gate,up}.weight -> ffn.xin : cat", "blocks.0.ffn.xin", layer_of(), file)
    assert got.shape == (3, 4, 4) and got[:, :, 0].tolist() == [
        [0, 0, 1, 1],
        [10, 10, 11, 11],
        [20, 20, 21, 21],
    ]


def test_gains_of_heads_are_stacked() -> None:
    file = {f"m.0.k.{h}.weight": torch.full((4,), float(h)) for h in range(2)}
    got = round_trip("@.{q,k}.{h} -> mix.{qn,kn}", "blocks.0.mix.kn.weight", layer_of(), file)
    assert got[:, 0].tolist() == [0.0, 1.0]


def test_slabs_of_experts() -> None:
    up = {f"m.0.{w}": torch.arange(24.0).view(6, 4) + 100 * (w == "v") for w in ("w", "v")}
    got = round_trip("@.{w,v} -> ffn.xin : ex", "blocks.0.ffn.xin", layer_of(), up)
    assert got.shape == (3, 4, 4) and got[1, :, 0].tolist() == [8, 12, 108, 112]
    down = round_trip("@.w -> ffn.xout : exT", "blocks.0.ffn.xout", layer_of(), {"m.0.w": up["m.0.w"]})
    assert down.shape == (3, 4, 2) and down[1, :, 0].tolist() == [8, 9, 10, 11]


def test_squeezed_and_shards_of_four() -> None:
    flat = round_trip(
        "@.t -> mix.mix_k : sq", "blocks.0.mix.mix_k", layer_of(), {"m.0.t": torch.ones(1, 1, 4)}
    )
    assert flat.shape == (4,)
    rows = torch.arange(48.0)[:, None]
    attn = replace(layer_of().attn, n_kv=4)
    got = round_trip("@.w -> mix.qkv : mp4qvk", "blocks.0.mix.qkv.weight", layer_of(attn=attn),
                     {"m.0.w.weight": rows})  # fmt: skip
    assert got[:5, 0].tolist() == [0, 1, 2, 3, 12] and got[16:20, 0].tolist() == [8, 9, 10, 11]


def test_latent_attention_turns_its_rotary_slice() -> None:
    attn = Attn(n_head=2, n_kv=2, head_dim=6, rope=Rope(dim=4, interleaved=True),
                mla=MLA(q_rank=None, kv_rank=3, nope=2, rope=4, v=2))  # fmt: skip
    layer = layer_of(attn=attn)
    q = round_trip("@.q -> mix.q : rope_mla_q", "blocks.0.mix.q.weight", layer,
                   {"m.0.q.weight": torch.arange(12.0)[:, None]})  # fmt: skip
    assert q[:, 0].tolist() == [0, 1, 2, 4, 3, 5, 6, 7, 8, 10, 9, 11]
    kv = round_trip("@.a -> mix.kva : rope_mla_kv", "blocks.0.mix.kva.weight", layer,
                    {"m.0.a.weight": torch.arange(7.0)[:, None]})  # fmt: skip
    assert kv[:, 0].tolist() == [0, 1, 2, 3, 5, 4, 6]


def test_gains_turn_with_their_heads() -> None:
    full = {"m.0.qn.weight": torch.arange(16.0)}
    got = round_trip("@.qn -> mix.qn : rope", "blocks.0.mix.qn.weight", layer_of(
        attn=replace(layer_of().attn, rope=Rope(dim=4, interleaved=True))), full)  # fmt: skip
    assert got[:8].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_head_in_two_sections() -> None:
    # each half of the head is a rotate-half head of its own: first halves come first
    attn = Attn(n_head=1, n_kv=1, head_dim=8, rope=Rope(dim=8, sections=(2, 2)))
    got = round_trip("@.w -> mix.qkv : rope", "blocks.0.mix.qkv.weight", layer_of(attn=attn),
                     {"m.0.w.weight": torch.arange(24.0)[:, None]})  # fmt: skip
    assert got[:8, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7] and got[16:, 0].tolist() == list(range(16, 24))


def test_rotate_half_files_are_left_alone() -> None:
    attn = replace(layer_of().attn, rope=Rope(dim=4))
    file = {"m.0.w.weight": torch.arange(32.0)[:, None]}
    got = round_trip("@.w -> mix.qkv : rope", "blocks.0.mix.qkv.weight", layer_of(attn=attn), file)
    assert torch.equal(got, file["m.0.w.weight"])


def test_other_names_are_read_and_written_back() -> None:
    text = """
    table a @=m.layers.{i} ~=m
    prefix? m.; ~.embeddings -> embed; @.{q,k} -> mix.qkv : cat
    or ~.embedding -> embed; or @.qk -> mix.qkv
    """
    table = rules.parse(text)
    usual = {"m.embeddings.weight", "m.layers.0.q.weight", "m.layers.0.k.weight"}
    assert table.spelled(usual) == table
    for early in ({"m.embedding.weight", "m.layers.0.qk.weight"}, {"embedding.weight", "layers.0.qk.weight"}):
        found = table.spelled(early)
        assert found.spelling == ("m.embedding", "m.layers.{i}.qk")
        assert found.sources("embed") == ("m.embedding",)
        steps = rules.plan(found, spec(), ["embed.weight", "blocks.0.mix.qkv.weight"])
        file = {key: torch.randn(6, 2) for key in sorted(early)}
        loaded, bare = rules.load(found, steps, file.keys(), file.__getitem__, "here")
        again = table.spelled(found.spelling)  # what a model remembers
        assert again == found
        back = rules.export(again, rules.plan(again, spec(), loaded), loaded, bare)
        assert back.keys() == file.keys() and all(torch.equal(back[key], file[key]) for key in file)
    mixed = table.spelled({"m.embeddings.weight", "m.layers.0.qk.weight"})
    assert mixed.spelling == ("m.layers.{i}.qk",)
    with pytest.raises(UserError, match=r"m\.embedding\.weight"):  # both: which is meant?
        both = table.spelled(usual | {"m.embedding.weight"})
        rules.assign(
            both,
            rules.plan(both, spec(), ["embed.weight"]),
            {"m.embedding.weight", "m.embeddings.weight"},
            "x",
        )


def test_a_derived_table_has_the_other_names_of_its_base() -> None:
    text = """
    table a ~=m; ~.x -> embed; or ~.y -> embed
    table b like a s/.y/.w/
    table c like a; - embed; ~.z -> embed
    """
    assert [other.sources for other in rules.parse(text).others] == [("m.y",), ("m.w",)]
