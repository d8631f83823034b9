"""`caravan data show`: the right tokens, masks, cuts and packing, and nothing that a terminal would obey."""

import re
from html.parser import HTMLParser
from pathlib import Path

import orjson
import pytest

from caravan import cli
from caravan.data import peek, records
from caravan.data.pack import fit
from caravan.data.render import render
from caravan.data.tokenizer import train
from caravan.report import records as shown
from caravan.store import Store
from caravan.types import Conversation, Document, Labelled, Message, Ranking, UserError

U, A = (lambda text, role=role: Message(role, text) for role in ("user", "assistant"))
TALK = Conversation((U("What is 2+2?"), A("It is 4. 🙂 你好"), U("And more?"), A("No.")), "talk")
TOK = train(["What is 2+2? It is 4. And more? No.\n" * 5], 300)


def write(path: Path, *values: Conversation | Ranking | Labelled) -> Path:
    path.write_bytes(b"".join(map(records.dump, values)))
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["data", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_pieces_are_the_tokens_with_their_mask() -> None:
    look = next(peek.looks(TALK, TOK, 1000))
    rendered = render(TALK.messages, TOK)
    assert (look.tokens, look.trained, look.kept) == (len(rendered), sum(rendered.mask), len(rendered))
    assert "".join(p.text for p in look.pieces) == TOK.decode(rendered.ids, skip_special=False)
    assert "".join(p.text for p in look.pieces if p.trained) == "It is 4. 🙂 你好<|im_end|>No.<|im_end|>"
    special = [p.text for p in look.pieces if p.special]
    assert special == ["<|im_start|>", "<|im_end|>"] * 4 and not any(p.cut for p in look.pieces)
    assert not any("\ufffd" in p.text for p in look.pieces), "no character is torn"


def test_what_does_not_fit_is_marked_as_training_would_cut_it() -> None:
    rendered = render(TALK.messages, TOK)
    kept = fit(rendered, len(rendered) - 3)
    look = next(peek.looks(TALK, TOK, len(rendered) - 3))
    assert kept is not None and look.kept == len(kept) < len(rendered)
    text = "".join(p.text for p in look.pieces if not p.cut)
    assert text == TOK.decode(kept.ids, skip_special=False) and text.endswith("你好<|im_end|>")
    assert "cut to" in shown.summary(look)
    nothing = next(peek.looks(TALK, TOK, 8))
    assert nothing.kept == 0 and all(p.cut for p in nothing.pieces) and "left out" in shown.summary(nothing)


def test_every_kind_of_record() -> None:
    ranking = Ranking((U("q"),), ("worse", "better", "worse too"), (1, 0, 1), "r")
    looks = list(peek.looks(ranking, TOK, 100))
    assert [x.title for x in looks] == ["r, rank 0", "r, rank 1", "r, rank 1"]
    assert "".join(p.text for p in looks[0].pieces if p.trained) == "better<|im_end|>"
    label = next(peek.looks(Labelled((U("q"),), "a", False, "l"), TOK, 100))
    assert label.title == "l, bad" and "".join(p.text for p in label.pieces if p.trained) == "a<|im_end|>"
    text = next(peek.looks(Document("d", "some text"), TOK, 4))
    assert text.trained == text.tokens == text.kept
    odd = next(peek.looks(Conversation((Message("alien", "x"), A("y")), "o"), TOK, 100))
    assert "unknown role 'alien'" in odd.problem and "cannot be rendered" in shown.summary(odd)


def test_packing_counts() -> None:
    looks = [peek.Look("", (), n, 1, k) for n, k in ((60, 60), (40, 40), (120, 90), (30, 0))]
    packing = peek.packing([*looks, peek.Look("", (), 0, 0, 0, "bad")], 100)
    assert (packing.sequences, packing.tokens, packing.contexts) == (3, 190, 2)
    assert (packing.truncated, packing.lost) == (1, 1) and packing.filled == 0.95
    assert peek.packing([peek.Look("", (), 250, 250, 250)], 100).contexts == 3, "a document fills several"
    assert peek.packing([], 100).filled == 0.0


def test_the_terminal_names_the_format_and_marks_the_loss(tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "x.jsonl", TALK, TALK)
    code, out, err = run(capsys, "show", str(path), "--n", "1", "--context", "64")
    assert code == 0 and not err
    assert out.startswith("x.jsonl: conversations as openai: records hold a list 'messages'\n")
    assert out.count("── talk") == 1 and "⟦It is 4. 🙂 你好<|im_end|>⟧" in out and "2 sequences" in out
    code, out, _ = run(capsys, "show", str(path), "--skip", "2")
    assert code == 1 and "0 sequences" in out


def test_model_and_template_are_those_asked_for(tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "x.jsonl", TALK)
    TOK.save(tmp_path / "model")
    _, out, _ = run(capsys, "show", str(path), "--model", str(tmp_path / "model"))
    assert f"{len(render(TALK.messages, TOK))} tokens" in out and "template its own" in out
    _, out, _ = run(capsys, "show", str(path), "--template", "llama-2")
    assert "[INST]" in out and "<|im_start|>" not in out
    _, out, _ = run(capsys, "show", str(path), "--template", "llama-3")
    assert "<|start_header_id|>user<|end_header_id|>" in out
    code, _, err = run(capsys, "show", str(path), "--template", "lama-3")
    assert code == 2 and "did you mean llama-3" in err


def test_artefacts_are_shown(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("CARAVAN_STORE", str(tmp_path / "store"))
    write(tmp_path / "x.jsonl", *(Labelled((U(f"q{k}"),), "a", k > 2, f"l{k}") for k in range(9)))
    assert cli.main(["preferences", "--raw", str(tmp_path / "x.jsonl")]) == 0
    ref = capsys.readouterr().out.strip()
    code, out, _ = run(capsys, "show", ref, "--n", "99")
    assert code == 0 and "train.labels.jsonl: preferences as kto" in out
    assert out.count("── l") == Store().open(ref).facts["train_labels"]
    code, _, err = run(capsys, "show", "no-such-thing")
    assert code == 2 and "there is no file no-such-thing" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "usage: caravan data show FILE|REF"),
        (["shew", "x"], "usage: caravan data show"),
        (["show", "--n", "3"], "usage: caravan data show"),
        (["show", "x", "--n", "0"], "`--n 0` is too small"),
        (["show", "x", "--nn", "1"], "nn"),
    ],
)
def test_wrong_words_are_explained(capsys, words: list[str], said: str) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "") and said in err


HOSTILE = (
    "<script>alert(1)</script> \x1b[31mred\x1b]0;title\x07 \u202eevil\u202c <|im_end|> &amp; \"'><b>\x9b"
)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_data_is_only_shown(tmp_path: Path, capsys) -> None:
    value = Conversation((U(HOSTILE), A(HOSTILE)), HOSTILE, HOSTILE)
    path = write(tmp_path / "<img src=x onerror=alert(1)>.jsonl", value)
    page = tmp_path / "page.html"
    code, out, _ = run(capsys, "show", str(path), "--html", str(page))
    assert code == 0
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", out)
    assert "␛[31mred" in out and "⟨U+202E⟩evil" in out
    text = page.read_text()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    found = _Page()
    found.feed(text)
    allowed = "html head meta title style body h1 h2 ul li p span pre"
    assert {tag for tag, _ in found.tags} <= set(allowed.split())
    assert not any(name.startswith("on") or name in ("src", "href") for _, a in found.tags for name in a)
    assert found.text.count("<script>alert(1)</script>") >= 2 and "url(" not in text and "@import" not in text
    trained = re.findall(r'<span class="m[^"]*">(.*?)</span>', text)
    assert "".join(trained).count("&lt;script&gt;") == 1, "in the answer, once"


def test_the_page_shows_what_was_not_read(tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "x.jsonl", TALK)
    path.write_bytes(path.read_bytes() + b"{<broken\n")
    _, _, err = run(capsys, "show", str(path), "--html", str(tmp_path / "p.html"))
    text = (tmp_path / "p.html").read_text()
    assert "not read" in err and "line 2" in text and "{&lt;broken" not in text.split("not read")[0]
    code, _, err = run(capsys, "show", str(path), "--html", str(tmp_path / "no" / "p.html"))
    assert code == 2 and "p.html" in err


def test_what_is_of_two_kinds_says_so(tmp_path: Path, capsys) -> None:
    rated = write(tmp_path / "k.jsonl", {"prompt": "q", "completion": "a", "label": True})
    _, out, _ = run(capsys, "show", str(rated))
    first, second, *_ = out.splitlines()
    assert first.startswith("k.jsonl: conversations as kto") and second.startswith("also preferences as kto")
    assert second.endswith("(--kind preferences)")
    _, out, _ = run(capsys, "show", str(rated), "--kind", "preferences")
    assert "also" not in out
    _, out, _ = run(capsys, "show", str(write(tmp_path / "x.jsonl", TALK)))
    assert "also" not in out


def test_kinds_are_found_out(tmp_path: Path, kit: Path) -> None:
    def kind(path: str) -> tuple[str, int]:
        found = peek.open_source(kit / path, "auto", "auto", 0, 2)
        return found.kind, len(found.values)

    assert kind("sft/identity.json") == ("conversations", 2)
    assert kind("preference/hh_harmless_1800.jsonl") == ("preferences", 2)
    assert kind("pretrain/web/c4_demo.jsonl") == ("corpus", 2)
    (tmp_path / "x.jsonl").write_bytes(orjson.dumps({"alpha": 1}))
    with pytest.raises(UserError, match="nothing that gives conversations"):
        peek.open_source(tmp_path / "x.jsonl", "auto", "auto", 0, 2)
