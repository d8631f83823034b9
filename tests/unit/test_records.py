"""Our own lines: plain ones keep their bytes, tools and labels come back as they went; what stages refuse."""

import json
from pathlib import Path
from typing import Any

import orjson
import pytest

from caravan import stage
from caravan.data import formats, records
from caravan.data.tools import as_text, joined, order_problem
from caravan.stages import conversations, preferences
from caravan.store import Artefact, Store
from caravan.types import Conversation, Labelled, Message, Ranking, ToolCall, UserError

U, A, S = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system"))
TOOL = '{"type":"function","function":{"name":"add","parameters":{"a":[1,2.5,null]}}}'


def chat(*turns: Message) -> Conversation:
    return Conversation(turns, "1", "me")


CALLING = chat(
    Message("system", "", tools=(TOOL,)),
    U("q"),
    Message("assistant", "", (ToolCall("add", '{"a":1,"b":"é"}', "c1"), ToolCall("add", "{}"))),
    Message("tool", "3", tool_call_id="c1"),
    Message("tool", "4", name="add"),
    A("a"),
)


def test_plain_lines_keep_their_bytes() -> None:
    line = records.dump(chat(S("s"), U("q\n"), A("é")))
    assert line.decode() == (
        '{"messages":[{"role":"system","content":"s"},{"role":"user","content":"q\\n"},'
        '{"role":"assistant","content":"é"}],"id":"1","source":"me"}\n'
    )
    line = records.dump(Ranking((U("q"),), ("a", "b"), (0, 1), "1", "me"))
    assert line.decode() == (
        '{"prompt":[{"role":"user","content":"q"}],"responses":["a","b"],"ranks":[0,1],"id":"1","source":"me"}\n'
    )
    assert list(records.words_of((U("q"), A("a")))) == ["user", "q", "assistant", "a"]


def test_tools_and_labels_come_back(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(records.dump(CALLING))
    assert list(records.read_conversations(tmp_path / "x.jsonl")) == [CALLING]
    label = Labelled((U("q"),), "a", False, "1", "me")
    (tmp_path / "y.jsonl").write_bytes(records.dump(label))
    assert list(records.read_labelled(tmp_path / "y.jsonl")) == [label]
    row = json.loads(records.dump(CALLING))["messages"][2]["tool_calls"][0]
    function = {"name": "add", "arguments": '{"a":1,"b":"é"}'}
    assert row == {"type": "function", "id": "c1", "function": function}, "as others write it"


@pytest.mark.parametrize("value", [chat(S("s"), U("q"), A("a")), CALLING], ids=["plain", "tools"])
def test_our_own_files_are_read_back_as_foreign_ones(tmp_path: Path, value: Conversation) -> None:
    (tmp_path / "x.jsonl").write_bytes(records.dump(value))
    chosen: dict[str, str] = {}
    found = list(formats.read_all(tmp_path, "conversations", print, formats.Limits(), chosen))
    assert found[0].value == value and chosen["x.jsonl"].startswith("openai")
    assert order_problem(found[0].value.messages) is None
    ranking = Ranking((S("s"), U("q")), ("a", "b", "c"), (2, 0, 1), "7", "me")
    (tmp_path / "x.jsonl").write_bytes(records.dump(ranking))
    found = list(formats.read_all(tmp_path, "preferences", print, formats.Limits(), chosen))
    assert found[0].value == ranking and chosen["x.jsonl"].startswith("kwise")
    label = Labelled((U("q"), A("a"), U("r")), "b", True, "8", "me")
    (tmp_path / "x.jsonl").write_bytes(records.dump(label))
    found = list(formats.read_all(tmp_path, "preferences", print, formats.Limits(), chosen))
    assert found[0].value == label and chosen["x.jsonl"].startswith("kto")


CALL, RESULT = Message("assistant", "", (ToolCall("add", "{}", "1"),)), Message("tool", "3", tool_call_id="1")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([U("q"), A("a"), U("r"), A("b")], None),
        (list(CALLING.messages), None),
        ([U("q"), CALL], None),
        ([U("q"), S("late"), A("a")], "at the beginning only"),
        ([A("a"), U("q")], "before the first answer"),
        ([U("q"), U("r"), A("a")], "turn 2 is another one of the user"),
        ([U("q"), A("a"), A("b")], "turn 3 is another one of the assistant"),
        ([U("q"), A("a"), RESULT, A("b")], "answers an open call (turn 3)"),
        ([U("q"), CALL, RESULT, RESULT, A("b")], "answers an open call (turn 4)"),
        ([U("q"), CALL, Message("tool", "3", tool_call_id="2"), A("b")], "answers an open call (turn 3)"),
        ([U("q"), CALL, A("b")], "a result of 'add' before turn 3"),
        ([U("q"), CALL, RESULT, U("r")], "an answer behind the results"),
        ([Message("system", "", tools=(TOOL,)), U("q"), Message("assistant", "", (ToolCall("sub", "{}"),))],
         "calls 'sub'"),
    ],
)  # fmt: skip
def test_order_of_turns(messages: list[Message], words: str | None) -> None:
    found = order_problem(messages)
    assert found is None if words is None else words in str(found)


def test_turns_in_a_row_may_be_joined_or_kept() -> None:
    twice = [U("q"), U("r"), A("a"), A("b")]
    assert joined(twice) == [U("q\n\nr"), A("a\n\nb")]
    assert order_problem(twice, repeats=True) is None
    assert joined([U("q"), CALL, A("b")]) == [U("q"), CALL, A("b")], "a call waits for its result"


def test_tools_as_text() -> None:
    system, _, calls, *_ = as_text(CALLING.messages)
    assert system == S("# Tools\n" + TOOL)
    assert calls.content.startswith(
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>\n'
    )
    assert any('"name": "add"' in text for text in records.texts_of([CALLING])), "tokenizers see calls"
    assert as_text(CALLING.messages, calls=False, tools=False) == list(CALLING.messages)


# -- the stages ----------------------------------------------------------------------------------------------


def run(
    folder: Path, name: str, rows: list[Any], more: dict[str, Path] | None = None, **cfg: Any
) -> Artefact:
    folder.mkdir(exist_ok=True)
    (folder / "raw.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    store = Store(folder / "store")
    inputs = {"raw": store.add(folder / "raw.jsonl")}
    inputs |= {role: store.add(path) for role, path in (more or {}).items()}
    module = {"conversations": conversations, "preferences": preferences}[name]
    return stage.execute(store, name, module.Config(**cfg), inputs)


def row(*turns: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(turns)]}


LONG = (
    "the river runs past the old mill and under the stone bridge before it meets the sea near a small harbour"
)


def test_near_duplicates_are_counted_or_dropped(tmp_path: Path) -> None:
    words = LONG.split()
    rows = [
        row("Describe it.", " ".join([*words, *words[::-1]])),
        row("Describe it.", " ".join([*words, *words[::-1], "indeed"])),
        row("What is 1+1?", "It is 2."),
        row("What is 1+2?", "It is 3."),
    ]
    counted = run(tmp_path / "a", "conversations", rows, similarity=0.7)
    assert (counted.facts["near_duplicates"], counted.facts["conversations"]) == (1, 4)
    assert not (counted / "removed.jsonl").exists()
    dropped = run(tmp_path / "b", "conversations", rows, similarity=0.7, near_duplicates="drop")
    assert (dropped.facts["near_duplicates"], dropped.facts["removed"], dropped.facts["conversations"]) == (
        1,
        1,
        3,
    )
    removed = list(records.read_lines(dropped / "removed.jsonl"))
    assert removed[0]["rule"] == "near duplicate" and "resembles" in removed[0]["reason"]
    kept = [c for s in records.SPLITS for c in records.read_conversations(dropped / f"{s}.jsonl")]
    longer = next(c for c in kept if c.messages[-1].content.endswith("indeed"))
    assert f"resembles {longer.id}, which stays" in removed[0]["reason"], "the longer one stays"
    off = run(tmp_path / "c", "conversations", rows, near_duplicates="off")
    assert off.facts["near_duplicates"] == 0
    again = run(tmp_path / "d", "conversations", rows[::-1], similarity=0.7, near_duplicates="drop")
    kept_again = [c for s in records.SPLITS for c in records.read_conversations(again / f"{s}.jsonl")]
    assert {c.messages for c in kept_again} == {c.messages for c in kept}, "whatever the order"


def test_benchmark_items_are_taken_out(tmp_path: Path) -> None:
    benchmark = tmp_path / "bench.jsonl"
    benchmark.write_bytes(orjson.dumps({"question": LONG, "answer": "x"}))
    rows = [row("q", "a"), row(f"Tell me: {LONG}?", "b"), row("r", "c")]
    art = run(tmp_path / "a", "conversations", rows, {"benchmarks": benchmark}, heldout_share=0.0)
    assert (art.facts["contaminated"], art.facts["conversations"]) == (1, 2)
    assert "bench.jsonl 0" in next(records.read_lines(art / "removed.jsonl"))["reason"]
    art = run(tmp_path / "b", "conversations", rows, {"benchmarks": benchmark}, contaminated="count")
    assert (art.facts["contaminated"], art.facts["conversations"]) == (1, 3)
    pair = {"prompt": LONG, "chosen": "a", "rejected": "b"}
    other = {"prompt": "q", "completion": LONG, "label": True}
    for number, data in enumerate((pair, other)):
        rows = [data, {**data, "prompt": "harmless", "completion": "fine"}]
        art = run(tmp_path / f"p{number}", "preferences", rows, {"benchmarks": benchmark})
        assert (art.facts["contaminated"], art.facts["removed"]) == (1, 1)


def test_turns_of_one_speaker(tmp_path: Path) -> None:
    twice = {"messages": [{"role": r, "content": r[0]} for r in ("user", "user", "assistant")]}
    refused = run(tmp_path / "a", "conversations", [twice, row("q", "a")])
    assert (refused.facts["conversations"], refused.facts["quarantined"]) == (1, 1)
    assert list(refused.facts["quarantined_why"]) == ["users and assistant taking turns"]
    joined_ = run(tmp_path / "b", "conversations", [twice, row("q", "a")], turns="join")
    assert (joined_.facts["conversations"], joined_.facts["joined"]) == (2, 1)
    kept = run(tmp_path / "c", "conversations", [twice, row("q", "a")], turns="keep")
    assert (kept.facts["conversations"], kept.facts["joined"]) == (2, 0)


def test_tools_are_kept_and_counted(tmp_path: Path) -> None:
    stray = {"messages": [{"role": r, "content": "x"} for r in ("user", "tool", "assistant")]}
    art = run(tmp_path, "conversations", [json.loads(records.dump(CALLING)), stray], heldout_share=0.0)
    facts = art.facts
    assert (facts["conversations"], facts["quarantined"], facts["trimmed"]) == (1, 1, 0)
    assert (facts["with_tools"], facts["tool_calls"], facts["with_system"], facts["answers"]) == (1, 2, 0, 2)
    assert (facts["multi_turn"], facts["answers_per_conversation"]) == (0, {"2": 1})
    found = next(records.read_conversations(art / "train.jsonl"))
    assert [m.role for m in found.messages] == [m.role for m in CALLING.messages]
    assert found.messages[2].tool_calls[0] == ToolCall("add", '{"a":1,"b":"é"}', "c1")


def test_labelled_answers_lie_beside_rankings(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{k}", "completion": f"a{k}", "label": k % 3 > 0} for k in range(30)]
    art = run(tmp_path / "a", "preferences", [*rows, rows[0], {**rows[1], "completion": " "}])
    facts = art.facts
    assert (facts["labels"], facts["good"], facts["bad"], facts["rankings"]) == (30, 20, 10, 0)
    assert (facts["duplicates"], facts["quarantined"], facts["prompts"]) == (1, 1, 30)
    sides = {s: list(records.read_labelled(art / f"{s}.labels.jsonl")) for s in records.SPLITS}
    assert (
        len(sides["train"]) == facts["train_labels"] and len(sides["heldout"]) == facts["heldout_labels"] > 0
    )
    assert (art / "train.jsonl").stat().st_size == 0
    pairs = run(tmp_path / "b", "preferences", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    assert not (pairs / "train.labels.jsonl").exists() and "labels" not in pairs.facts


def test_the_format_can_be_asked_for(tmp_path: Path) -> None:
    both = {"instruction": "q", "output": "a", "messages": [{"role": "user", "content": "x"}]}
    with pytest.raises(UserError, match=r"as alpaca .* and as openai"):
        run(tmp_path / "a", "conversations", [both])
    art = run(tmp_path / "b", "conversations", [both], format="alpaca")
    assert list(art.facts["formats"]) == ["alpaca: it was asked for"]
    with pytest.raises(UserError, match="no format 'alpaka'"):
        run(tmp_path / "c", "conversations", [both], format="alpaka")


def test_lengths_and_languages(tmp_path: Path) -> None:
    english = "This is a sentence that is written in the English language for everybody to read. "
    chinese = "这是一个用中文写的句子，大家都可以阅读和理解它的意思。"
    rows = [row(f"{k}", english * (k + 1)) for k in range(9)] + [row("问", chinese * 4)]
    facts = run(tmp_path, "conversations", rows, near_duplicates="off").facts
    assert facts["languages"] == {"en": 9, "zh": 1}
    size = len(english)
    assert facts["answer_chars_spread"] == {
        "p50": size * 4,
        "p90": size * 8,
        "p99": size * 8,
        "max": size * 9,
    }
    assert facts["question_chars"]["max"] == 1 and facts["answer_chars"] == size * 45 + len(chinese) * 4
