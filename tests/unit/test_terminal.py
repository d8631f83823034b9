"""The terminal chat: commands, pipes, Ctrl-C, and no control codes from the model."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import pytest

from caravan.serve import terminal
from caravan.types import Message, Sampling, UserError

ESCAPE = "\x1b]0;owned\x07\x9b31m"


class Echo:
    """Answers with what it was asked, piece by piece, and remembers the conversations."""

    def __init__(self) -> None:
        self.heard: list[list[Message]] = []
        self.closed = 0

    def __call__(self, messages: list[Message], sampling: Sampling) -> Iterator[str]:
        self.heard.append(list(messages))
        last = messages[-1].content
        try:
            yield "you said "
            if last == "interrupt":
                raise KeyboardInterrupt
            if last == "too long":
                raise UserError("no room", "/reset")
            yield last
        finally:
            self.closed += 1


def script(*lines: str) -> Callable[[], str | None]:
    rest = iter([*lines])
    return lambda: next(rest, None)


def test_turns_reset_system_and_quit() -> None:
    echo, out = Echo(), io.StringIO()
    lines = ("hi", "", "again", "/system be brief", "third", "/reset", "fourth", "/what", "/quit", "never")
    assert terminal.talk(echo, "", Sampling(), script(*lines), out) == 0
    asked = [[(m.role, m.content) for m in messages] for messages in echo.heard]
    assert asked[0] == [("user", "hi")]
    assert asked[1] == [("user", "hi"), ("assistant", "you said hi"), ("user", "again")]
    assert asked[2][0] == ("system", "be brief") and len(asked[2]) == 6
    assert asked[3] == [("system", "be brief"), ("user", "fourth")]
    assert len(asked) == 4, "commands and what follows /quit are not asked"
    assert out.getvalue().startswith("you said hi\n\n")


def test_ctrl_c_stops_the_answer_and_not_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    echo, out = Echo(), io.StringIO()
    terminal.talk(echo, "", Sampling(), script("interrupt", "next"), out)
    assert echo.closed == 2 and "stopped" in capsys.readouterr().err
    assert echo.heard[1][1] == Message("assistant", "you said "), "what was written stays in the conversation"


def test_a_refused_question_is_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    echo = Echo()
    terminal.talk(echo, "", Sampling(), script("too long", "next"), io.StringIO())
    assert "no room (/reset)" in capsys.readouterr().err and echo.heard[1] == [Message("user", "next")]


def test_a_pipe_gets_one_answer_and_an_empty_one_a_hint() -> None:
    echo, out = Echo(), io.StringIO()
    assert terminal.once(echo, "12+29=?\n", "be brief", Sampling(), out) == 0
    assert out.getvalue() == "you said 12+29=?\n"
    assert echo.heard == [[Message("system", "be brief"), Message("user", "12+29=?")]]
    with pytest.raises(UserError, match="stdin was empty"):
        terminal.once(echo, " \n", "", Sampling(), out)


def test_the_model_cannot_drive_the_terminal() -> None:
    assert terminal.plain(f"a{ESCAPE}b\n\t你\x7f") == "a]0;owned31mb\n\t你"
    out = io.StringIO()
    terminal.once(lambda messages, sampling: iter([ESCAPE, "ok"]), "hi", "", Sampling(), out)
    assert "\x1b" not in out.getvalue() and "\x07" not in out.getvalue()
