"""Chats and preferences of every outside format: found out from their content, and read right."""

import json
import re
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from caravan.data import formats, records
from caravan.data.formats import Limits, Problem
from caravan.data.formats._turns import message_of
from caravan.data.render import render
from caravan.data.tokenizer import train
from caravan.data.tools import order_problem
from caravan.types import Conversation, Labelled, Message, Ranking, ToolCall, UserError

U, A, S, T = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system", "tool"))


def read(path: Path, kind: str, **limits: int) -> tuple[list, list[Problem], dict[str, str]]:
    problems: list[Problem] = []
    chosen: dict[str, str] = {}
    found = list(formats.read_all(path, kind, problems.append, Limits(**limits), chosen))
    return [f.value for f in found], problems, chosen


def one(tmp_path: Path, row: dict, kind: str):
    """The single thing one record gives, and the format that was found."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(orjson.dumps(row))
    values, problems, chosen = read(path, kind)
    assert not problems and len(values) == 1
    return values[0], chosen["x.jsonl"].partition(":")[0]


CONVERSATIONS = {
    "alpaca": ({"instruction": "Add", "input": "1 2", "output": "3"}, (U("Add\n1 2"), A("3"))),
    "sharegpt": (
        {"system": "Be.", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        (S("Be."), U("q"), A("a")),
    ),
    "openai": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "a"},
            ]
        },
        (U("q"), A("a")),
    ),
    "kto": (
        {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "label": True},
        (U("q"), A("a")),
    ),
    "completion": ({"prompt": "q", "completion": "a\n<|endoftext|>"}, (U("q"), A("a"))),
    "belle": (
        {"instruction": "Human:q\n\nAssistant:a\n\nHuman:你好：r\nAssistant:", "input": "", "output": "b"},
        (U("q"), A("a"), U("你好：r"), A("b")),
    ),
    "dolly": (
        {"instruction": "q", "context": "c", "response": "a", "category": "closed_qa"},
        (U("q\n\nc"), A("a")),
    ),
    "flan": ({"inputs": " q\n", "targets": "a</s>", "task": "x.jsonl"}, (U("q"), A("a"))),
    "firefly": ({"kind": "x.jsonl", "input": "q", "target": "a"}, (U("q"), A("a"))),
    "qa": ({"问题": "q", "答案": "a"}, (U("q"), A("a"))),
    "self_instruct": (
        {"name": "n", "instruction": "q", "instances": [{"input": "i", "output": "a"}]},
        (U("q\ni"), A("a")),
    ),
    "sgd": (
        {"turns": [{"speaker": "USER", "utterance": "q", "frames": []},
                   {"speaker": "SYSTEM", "utterance": "a", "frames": [{"service": "s"}]}]},
        (U("q"), A("a")),
    ),
    "moss": (
        {"meta_instruction": "You are MOSS.", "chat": {
            "turn_10": {"Human": "<|Human|>: r<eoh>\n", "MOSS": "<|MOSS|>: b<eom>\n"},
            "turn_2": {"Human": "<|Human|>: q<eoh>\n", "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
                       "Commands": "<|Commands|>: None<eoc>\n", "Tool Responses": "<|Results|>: None<eor>\n",
                       "MOSS": "<|MOSS|>: a<eom>\n"}}},
        (S("You are MOSS."), U("q"), A("a"), U("r"), A("b")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversation_formats(tmp_path: Path, name: str) -> None:
    row, messages = CONVERSATIONS[name]
    value, chosen = one(tmp_path, row, "conversations")
    assert chosen == name
    assert value == Conversation(messages, "", "x.jsonl")


def test_alpaca_variants(tmp_path: Path) -> None:
    row = {"instruction": "q", "input": "<noinput>", "output": "a", "history": [["p", "b"]], "id": 3}
    value, _ = one(tmp_path, row, "conversations")
    assert value.messages == (U("p"), A("b"), U("q"), A("a")) and value.id == "3"


@pytest.mark.parametrize("history", [5, [["q"]], [["q", 1]], {"q": "a"}])
def test_alpaca_history_must_be_pairs(tmp_path: Path, history: object) -> None:
    rows = [{"instruction": "q", "output": "a", "history": h} for h in (history, "", [], None)]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    values, problems, _ = read(tmp_path, "conversations")
    assert len(values) == 3 and "[question, answer]" in problems[0].expected


def test_tools_and_function_calls(tmp_path: Path) -> None:
    row = {
        "tools": '[{"name": "add"}]',
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "add"}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "a"},
        ],
    }
    value, _ = one(tmp_path, row, "conversations")
    tool = '{"type":"function","function":{"name":"add"}}'
    call = Message("assistant", "", (ToolCall("add", "{}"),))
    assert value.messages == (Message("system", "", tools=(tool,)), U("q"), call, T("3"), A("a"))


def call(name: str, arguments: str = "{}", id: str = "") -> Message:
    return Message("assistant", "", (ToolCall(name, arguments, id),))


@pytest.mark.parametrize(
    ("kind", "turn", "message"),
    [
        ("from", {"from": "Human", "value": "x"}, U("x")),
        ("from", {"from": "用户", "value": "x"}, U("x")),
        ("from", {"from": "prompter", "value": "x"}, U("x")),
        ("from", {"from": "chatgpt", "value": "x"}, A("x")),
        ("from", {"from": "bard", "text": "x"}, A("x")),
        ("from", {"from": "助手", "value": "x"}, A("x")),
        ("role", {"role": "developer", "content": "x"}, S("x")),
        ("role", {"role": "tool", "content": "<tool_response>\nx\n</tool_response>"}, T("x")),
        ("role", {"role": "function", "name": "f", "content": "x"}, Message("tool", "x", name="f")),
        ("role", {"role": "tool", "tool_call_id": "1", "content": "x"}, Message("tool", "x", (), "", "1")),
        ("role", {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}},
         call("f")),
        ("role", {"role": "assistant", "content": "", "tool_calls": [
            {"id": "7", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}]},
         call("f", '{"a":[1]}', "7")),
        ("from", {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
         call("f", '{"a":1}')),
        ("from", {"from": "gpt", "value": 'ok\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'},
         Message("assistant", "ok", (ToolCall("f", "{}"),))),
        ("from", {"from": "gpt", "value": "a <tool_call> is a tag"}, A("a <tool_call> is a tag")),
    ],
)  # fmt: skip
def test_turns_in_every_spelling(kind: str, turn: dict, message: Message) -> None:
    assert message_of(turn) == message


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"from": "alien", "value": "x"}, "not 'alien'"),
        ({"role": None, "content": "x"}, "not None"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "text alone"),
        ({"from": "function_call", "value": "add(1, 2)"}, "a call as JSON"),
        ({"from": "function_call", "value": '{"arguments": {}}'}, "a name and arguments"),
        ({"from": "function_call", "value": '{"name": "f", "arguments": [1]}'}, "'f' that are a JSON object"),
        ({"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "f", "arguments": "{oops"}}]}, "arguments of 'f' as JSON"),
        ({"role": "assistant", "content": '<tool_call>{"name": }</tool_call>'}, "a call as JSON"),
        ({"role": "system", "content": "", "tools": "[{]"}, "tools as JSON"),
        ({"role": "system", "content": "", "tools": [{"type": "function"}]}, "objects with a name"),
    ],
)  # fmt: skip
def test_turns_that_cannot_be_read_say_why(turn: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        message_of(turn)


def test_words_and_calls_of_one_turn_stay_together(tmp_path: Path) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "I look."},
            {"from": "function_call", "value": '{"name": "f"}'},
            {"from": "function_call", "value": '{"name": "g"}'},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "a"},
        ],
        "functions": [{"name": "f"}, {"type": "function", "function": {"name": "g"}}],
    }
    value, _ = one(tmp_path, row, "conversations")
    system, _, answer, *_ = value.messages
    assert [json.loads(t)["function"]["name"] for t in system.tools] == ["f", "g"]
    assert answer == Message("assistant", "I look.", (ToolCall("f", "{}"), ToolCall("g", "{}")))
    assert len(value.messages) == 6 and order_problem(value.messages) is None


def test_moss_plugins_are_calls(tmp_path: Path) -> None:
    turn = {
        "Human": "<|Human|>: q<eoh>\n",
        "Inner Thoughts": "<|Inner Thoughts|>: I should look.<eot>\n",
        "Commands": '<|Commands|>: Search("a (b), \\"c\\""), Calculate("1+2")<eoc>\n',
        "Tool Responses": '<|Results|>:\nSearch("a") =>\nfound\nCalculate("1+2") =>\n3\n<eor>\n',
        "MOSS": "<|MOSS|>: a<eom>\n",
    }
    value, name = one(tmp_path, {"chat": {"turn_1": turn}}, "conversations")
    calls = (ToolCall("Search", '{"input":"a (b), \\"c\\""}'), ToolCall("Calculate", '{"input":"1+2"}'))
    first, second = Message("tool", 'Search("a") =>\nfound', name="Search"), 'Calculate("1+2") =>\n3'
    assert name == "moss" and value.messages == (
        U("q"), Message("assistant", "I should look.", calls), first,
        Message("tool", second, name="Calculate"), A("a"),
    )  # fmt: skip
    (tmp_path / "x.jsonl").write_bytes(orjson.dumps({"chat": {"turn_1": {**turn, "Tool Responses": "both"}}}))
    assert "each of the 2 commands" in read(tmp_path, "conversations")[1][0].expected
    (tmp_path / "x.jsonl").write_bytes(orjson.dumps({"chat": {"turn_1": {**turn, "Commands": "look it up"}}}))
    assert "commands such as" in read(tmp_path, "conversations")[1][0].expected


def rated(*ratings: str) -> dict:
    return {f"aspect {k}": {"Rating": rating} for k, rating in enumerate(ratings)}


PREFERENCES = {
    "hh": (
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: good",
            "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: bad",
        },
        Ranking((U("q"), A("a"), U("r")), ("good", "bad"), (0, 1), "", "x.jsonl"),
    ),
    "pairs": (
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        Ranking((U("q"),), ("good", "bad"), (0, 1), "", "x.jsonl"),
    ),
    "kwise": (
        {"prompt": "q", "responses": ["a", "b", "c"], "scores": [0.1, 9, 9]},
        Ranking((U("q"),), ("a", "b", "c"), (1, 0, 0), "", "x.jsonl"),
    ),
    "ultrafeedback": (
        {"instruction": "q", "completions": [
            {"response": "a", "overall_score": 10, "annotations": rated("1", "2")},
            {"response": "b", "overall_score": 7, "annotations": rated("4", "4")},
            {"response": "c", "overall_score": 8, "annotations": rated("5", "3")}]},
        Ranking((U("q"),), ("a", "b", "c"), (1, 0, 0), "", "x.jsonl"),
    ),
    "shp": (
        {"post_id": "p", "domain": "d", "history": "q\n", "human_ref_A": "a", "human_ref_B": "b",
         "labels": 0},
        Ranking((U("q"),), ("a", "b"), (1, 0), "p", "d"),
    ),
    "webgpt": (
        {"question": {"id": "1", "full_text": "q"}, "answer_0": "a", "answer_1": "b", "score_0": -0.5,
         "score_1": 0.5},
        Ranking((U("q"),), ("a", "b"), (1, 0), "", "x.jsonl"),
    ),
    "pandalm": (
        {"instruction": "q", "input": "i", "response1": "a", "response2": True, "annotator1": 2,
         "annotator2": 2, "annotator3": 0},
        Ranking((U("q\ni"),), ("a", "True"), (1, 0), "", "x.jsonl"),
    ),
    "kto": (
        {"prompt": "q", "completion": "a", "label": False},
        Labelled((U("q"),), "a", False, "", "x.jsonl"),
    ),
}  # fmt: skip


def test_what_is_of_another_kind_is_told_with_its_command(tmp_path: Path) -> None:
    hint = {}
    for kind, row in {
        "corpus": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                   "tools": '[{"name": "a tool with words"}]'},
        "preferences": {"instruction": "q", "output": "a"},
        "conversations": {"prompt": "q", "answers": [{"answer": "g", "rank": 1}, {"answer": "b", "rank": 2}]},
    }.items():  # fmt: skip
        with pytest.raises(
            UserError, match=f"nothing that gives {kind} .*records with {', '.join(row)}"
        ) as e:
            one(tmp_path, row, kind)
        hint[kind] = str(e.value.hint)
    assert hint["corpus"].endswith(
        "(sharegpt: records hold a list 'conversations'): `caravan conversations` reads it"
    )
    assert "`caravan conversations` reads it" in hint["preferences"]
    assert "`caravan preferences` reads it" in hint["conversations"]


@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_formats(tmp_path: Path, name: str) -> None:
    row, ranking = PREFERENCES[name]
    assert one(tmp_path, row, "preferences") == (ranking, name)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "q"}], "rejected": "b",
         "chosen": {"role": "assistant", "content": "g"}},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "g"},
         "rejected": {"from": "gpt", "value": "b"}},
        {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "g"}],
         "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "g"}],
         "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
        {"question": "q", "chosen": "g", "rejected": "b"},
        {"prompt": "q", "responses": ["g", "b"], "ranks": [0, 1]},
        {"prompt": "q", "responses": ["g", "b"], "ranks": [1, 2]},
        {"prompt": "q", "response_0": "g", "response_1": "b", "better_response_id": 0},
        {"prompt": "q", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "g"}],
         "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "g"}],
         "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
         "score_chosen": 8.0, "score_rejected": 5.0},
        {"prompt": "q", "completions": [{"response": "g", "score": 2}, {"response": "b", "score": 1}]},
        {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": [{"answer": "g", "model": "m", "rank": 1.0},
                                                            {"answer": "b", "model": "n", "rank": 2.0}]},
        {"prompt": "q", "responses": [{"text": "g", "score": 2}, {"text": "b", "score": 1}]},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "response": " g", "chosen": " g", "rejected": " b\n"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "responses": [" g", " b"], "ranks": [0, 1]},
        {"chosen": "\n\nHuman: q\n\nAssistant: g", "rejected": "\n\nHuman: q\n\nAssistant: b\n"},
    ],
)  # fmt: skip
def test_pairs_in_every_dress(tmp_path: Path, row: dict) -> None:
    value, _ = one(tmp_path, row, "preferences")
    assert value == Ranking((U("q"),), ("g", "b"), (0, 1), "", "x.jsonl")


def test_only_a_transcripts_space_is_cut_off(tmp_path: Path) -> None:
    """Elsewhere an answer's white space is the answer's own (code, say)."""
    value, _ = one(tmp_path, {"prompt": "q", "chosen": "    return 1\n", "rejected": "b"}, "preferences")
    assert value.responses[0] == "    return 1\n"
    row = {"prompt": "\n\nHuman: q\n\nAssistant:", "completion": " g", "label": True}
    assert one(tmp_path, row, "preferences")[0] == Labelled((U("q"),), "g", True, "", "x.jsonl")


@pytest.mark.parametrize("dress", ["openai", "sharegpt"])
def test_answers_of_no_weight_are_not_trained_on(tmp_path: Path, dress: str) -> None:
    def row(*weights: object) -> dict:
        answers = [{"role": "assistant", "content": "a", "weight": w} for w in weights]
        turns = [t for answer in answers for t in ({"role": "user", "content": "q"}, answer)]
        if dress == "openai":
            return {"messages": turns}
        return {"conversations": [{"from": t["role"], "value": t["content"], **t} for t in turns]}

    value, found = one(tmp_path, row(0, 1, None), "conversations")
    assert found == dress and [m.train for m in value.messages if m.role == "assistant"] == [
        False,
        True,
        True,
    ]
    assert records.conversation_of(orjson.loads(records.dump(value))) == value
    tok = train(["q a"], 300)
    made, all_of_it = (
        render(value.messages, tok),
        render([replace(m, train=True) for m in value.messages], tok),
    )
    assert made.ids == all_of_it.ids and sum(all_of_it.mask) == 3 * 2
    assert [i for i, m in enumerate(all_of_it.mask) if m][2:] == [i for i, m in enumerate(made.mask) if m]
    for weights, said in (((0, 0), "an answer to train on"), ((0.5,), "a weight of 0 or 1, not 0.5")):
        (tmp_path / "x.jsonl").write_bytes(orjson.dumps(row(*weights)))
        values, problems, _ = read(tmp_path / "x.jsonl", "conversations")
        assert not values and problems[0].expected.startswith(said)


def test_equal_scores_are_ties(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 5, "score_rejected": 5},
        {"question": "q", "answer_0": "a", "answer_1": "b", "score_0": 0, "score_1": 0},
        {"instruction": "q", "response1": "a", "response2": "b", "annotator1": 1, "annotator2": 2,
         "annotator3": 0},
        {"prompt": "q", "responses": ["a", "b"], "scores": [1.5, 1.5]},
    ]  # fmt: skip
    for row in rows:
        value, _ = one(tmp_path, row, "preferences")
        assert value.ranks == (0, 0) and not list(value.pairs())


def test_scores_of_one_kind_or_none(tmp_path: Path) -> None:
    three = {"annotations": rated("3")}
    rows = [
        {"instruction": "q", "completions": [{"response": "a", **three}, {"response": "b", "score": 2}]},
        {"instruction": "q", "completions": [
            {"response": "a", "annotations": rated("N/A"), "fine-grained_score": 2.5, "overall_score": 1},
            {"response": "b", **three, "fine-grained_score": 1.5, "overall_score": 9}]},
    ]  # fmt: skip
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    values, problems, _ = read(tmp_path, "preferences")
    assert [v.ranks for v in values] == [(0, 1)] and "for every completion" in problems[0].expected


def tree(**changed: object) -> dict:
    def node(id: str, role: str, *replies: dict, **more: object) -> dict:
        return {"message_id": id, "role": role, "text": id, "replies": list(replies), **more}

    answers = [
        node("a1", "assistant", node("q2", "prompter", node("a4", "assistant"), rank=1), rank=1),
        node("a2", "assistant", node("q3", "prompter", rank=1), node("q4", "prompter",
             node("a5", "assistant"), rank=0), rank=0),
        node("a3", "assistant", rank=2),
        node("gone", "assistant", rank=3, deleted=True),
        node("spam", "assistant", rank=4, review_result=False),
    ]  # fmt: skip
    return {"message_tree_id": "q1", "prompt": node("q1", "prompter", *answers), **changed}


def flat(node: dict, parent: str | None = None) -> list[dict]:
    rest = {k: v for k, v in node.items() if k != "replies"} | {"message_tree_id": "q1", "parent_id": parent}
    return [rest, *(row for reply in node["replies"] for row in flat(reply, node["message_id"]))]


@pytest.mark.parametrize("shape", ["tree", "messages"])
def test_assistant_trees(tmp_path: Path, shape: str) -> None:
    rows = [tree(tree_state="ready_for_export")] if shape == "tree" else flat(tree()["prompt"])
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    talks, problems, _ = read(tmp_path, "conversations")
    assert talks == [Conversation((U("q1"), A("a2"), U("q4"), A("a5")), "a5", "x.jsonl")] and not problems
    rankings, _, _ = read(tmp_path, "preferences")
    assert rankings == [Ranking((U("q1"),), ("a1", "a2", "a3"), (1, 0, 2), "q1", "x.jsonl")]
    assert len(list(rankings[0].pairs())) == 3


def test_trees_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(orjson.dumps(tree(tree_state="aborted_low_grade")))
    assert "ready for export" in read(tmp_path, "conversations")[1][0].expected
    rows = flat(tree()["prompt"])[1:]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    assert "no parent_id" in read(tmp_path, "conversations")[1][0].expected


def test_two_ways_to_read_a_file_are_an_error(tmp_path: Path) -> None:
    row = {"instruction": "q", "output": "a", "messages": [U("q"), A("a")]}
    (tmp_path / "x.jsonl").write_bytes(orjson.dumps(row))
    with pytest.raises(
        UserError, match=r"as alpaca \(.*'instruction'.*\) and as openai \(.*'messages'"
    ) as caught:
        read(tmp_path, "conversations")
    assert caught.value.hint == "say which: --format alpaca or --format openai"
    (tmp_path / "x.jsonl").write_bytes(b'{"instruction": "q", "output": "a"}\n' + orjson.dumps(row))
    with pytest.raises(UserError, match="as alpaca"):
        read(tmp_path, "conversations")
    (tmp_path / "x.jsonl").write_bytes(orjson.dumps(row))
    for name in ("alpaca", "openai"):
        chosen: dict[str, str] = {}
        found = list(formats.read_all(tmp_path, "conversations", print, Limits(), chosen, name))
        assert found[0].value.messages == (U("q"), A("a"))
        assert chosen == {"x.jsonl": f"{name}: it was asked for"}
    with pytest.raises(UserError, match="no format 'hh' that gives conversations") as caught:
        list(formats.read_all(tmp_path, "conversations", print, Limits(), {}, "hh"))
    assert "openai" in str(caught.value.hint)


def test_half_and_half_is_an_error_and_a_majority_is_not(tmp_path: Path) -> None:
    rows = [{"instruction": "q", "output": "a"}, {"inputs": "q", "targets": "a"}]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    with pytest.raises(UserError, match=r"as alpaca .* and as flan"):
        read(tmp_path, "conversations")
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(map(orjson.dumps, [*rows, rows[0]])))
    values, problems, _ = read(tmp_path, "conversations")
    assert len(values) == 2 and problems[0].place == "line 2"


def test_no_file_name_decides(tmp_path: Path) -> None:
    (tmp_path / "sharegpt_oasst_kto.jsonl").write_bytes(orjson.dumps({"input": "q", "target": "a"}))
    assert read(tmp_path, "conversations")[2]["sharegpt_oasst_kto.jsonl"].startswith("firefly: ")
