"""Sums and differences in English and Chinese, with a split of the *pairs of numbers* that nothing trained
ever shows.

Answers come in two styles. `direct` is the number alone. `steps` writes the problem down first, so that from
then on every digit has its place, and works the columns, right to left, every column the same shape (digit,
digit, carry), which a small model learns as a table of a few hundred entries:

    12+29  ->  12+29: 2+9=11, 1+2+1=4 → 41          52-19  ->  52-19: 12-9=3, 5-1-1=3 → 33

The last number of an answer is always the result. Digits are single tokens in our tokenizer.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from caravan.types import Conversation, Document, Message

Style = Literal["steps", "direct"]

TRAIN_FORMATS: dict[str, dict[str, tuple[str, ...]]] = {
    "+": {
        "en": (
            "{a}+{b}=?", "{a} + {b} = ?", "{a}+{b}", "{a} + {b}", "{a}+{b}=", "What is {a}+{b}?",
            "What is {a} + {b}?", "What is {a} plus {b}?", "what is {a} plus {b}",
            "How much is {a} plus {b}?", "Compute {a}+{b}.", "Add {a} and {b}.", "Please add {a} and {b}.",
            "What is the sum of {a} and {b}?", "Calculate {a} + {b}.",
            "Tom has {a} apples and gets {b} more. How many apples does he have now?",
            "There are {a} birds in a tree and {b} more come. How many birds are there?",
            "A book costs {a} coins and a pen costs {b} coins. How many coins do both cost?",
            "Anna walks {a} steps and then {b} steps. How many steps does she walk?",
        ),
        "zh": (
            "{a}加{b}等于多少？", "{a}+{b}等于几？", "{a}+{b}等于多少？", "{a}加{b}是多少？",
            "请计算{a}+{b}。", "计算 {a}+{b}", "{a}与{b}的和是多少？",
            "小明有{a}个苹果，又买了{b}个，一共有几个？", "树上有{a}只鸟，又飞来{b}只，现在有几只？",
            "一本书{a}元，一支笔{b}元，一共多少元？",
        ),
    },
    "-": {
        "en": (
            "{a}-{b}=?", "{a} - {b} = ?", "{a}-{b}", "{a} - {b}", "{a}-{b}=", "What is {a}-{b}?",
            "What is {a} - {b}?", "What is {a} minus {b}?", "what is {a} minus {b}",
            "How much is {a} minus {b}?", "Compute {a}-{b}.", "Subtract {b} from {a}.",
            "Calculate {a} - {b}.", "What is the difference of {a} and {b}?",
            "Tom has {a} apples and eats {b} of them. How many apples are left?",
            "There are {a} birds in a tree and {b} fly away. How many birds are left?",
            "Anna has {a} coins and spends {b} coins. How many coins does she have left?",
        ),
        "zh": (
            "{a}减{b}等于多少？", "{a}-{b}等于几？", "{a}-{b}等于多少？", "{a}减{b}是多少？",
            "请计算{a}-{b}。", "计算 {a}-{b}", "小明有{a}个苹果，吃了{b}个，还剩几个？",
            "树上有{a}只鸟，飞走{b}只，还剩几只？", "小红有{a}元，花了{b}元，还剩多少元？",
        ),
    },
}  # fmt: skip

HELD_OUT_SHARE = 10
"""One pair in this many is kept for evaluation."""


@dataclass(frozen=True, slots=True)
class Sum:
    """`a op b`; for "-", a >= b."""

    a: int
    op: Literal["+", "-"]
    b: int

    @property
    def result(self) -> int:
        return self.a + self.b if self.op == "+" else self.a - self.b


def held_out(a: int, b: int) -> bool:
    """Whether the pair {a, b} belongs to evaluation: one in ten by a hash, in either order and under either
    sign.

    Pairs that column work itself writes down (up to 18 and 9: "2+9=11", "12-9=3") are always trained.
    """
    low, high = min(a, b), max(a, b)
    if low <= 9 and high <= 19:
        return False
    return zlib.crc32(f"{low},{high}".encode()) % HELD_OUT_SHARE == 0


def _columns(problem: Sum) -> list[str]:
    a_digits, b_digits = (list(map(int, reversed(str(n)))) for n in (problem.a, problem.b))
    width = max(len(a_digits), len(b_digits))
    a_digits += [0] * (width - len(a_digits))
    b_digits += [0] * (width - len(b_digits))
    carry, lines = 0, []
    for place in range(width):
        x, y = a_digits[place], b_digits[place]
        tail = f"{problem.op}{carry}" if place else ""
        if problem.op == "+":
            value = x + y + carry
            lines.append(f"{x}+{y}{tail}={value}")
            carry = value // 10
        else:
            borrow = int(x - y - carry < 0)
            value = x + 10 * borrow - y - carry
            lines.append(f"{x + 10 * borrow}-{y}{tail}={value}")
            carry = borrow
    return lines


def solve(problem: Sum, style: Style = "steps") -> str:
    """The answer text; its last number is the result."""
    if style == "direct":
        return str(problem.result)
    asked, columns = f"{problem.a}{problem.op}{problem.b}", _columns(problem)
    if len(columns) == 1:
        return f"{asked}={problem.result}"
    return f"{asked}: {', '.join(columns)} → {problem.result}"


def draw(rng: random.Random, *, split: str, three_digit_share: float = 0.0) -> Sum:
    """One problem of a split ("train" or "heldout"): mostly two digits by two, some shorter, some three."""
    while True:
        kind = rng.random()
        if kind < three_digit_share:
            a, b = rng.randint(100, 999), rng.randint(10, 999)
        elif kind < three_digit_share + 0.15:
            a, b = rng.randint(0, 9), rng.randint(0, 9)
        elif kind < three_digit_share + 0.3:
            a, b = rng.randint(10, 99), rng.randint(0, 9)
        else:
            a, b = rng.randint(10, 99), rng.randint(10, 99)
        if rng.random() < 0.5:
            a, b = b, a
        if held_out(a, b) == (split == "heldout"):
            if rng.random() < 0.6:
                return Sum(a, "+", b)
            return Sum(max(a, b), "-", min(a, b))


def ask(problem: Sum, lang: str, rng: random.Random) -> str:
    """A question text for the problem in `lang` ("en" or "zh"); bare sums and word problems."""
    return rng.choice(TRAIN_FORMATS[problem.op][lang]).format(a=problem.a, b=problem.b)


def conversations(
    count: int, *, seed: int, split: str = "train", style: Style = "steps", zh_share: float = 0.3,
    three_digit_share: float = 0.05,
) -> list[Conversation]:  # fmt: skip
    """`count` questions of a split with their answers."""
    rng = random.Random(f"{seed}:arithmetic:{split}")
    out: list[Conversation] = []
    for index in range(count):
        problem = draw(rng, split=split, three_digit_share=three_digit_share)
        question = ask(problem, "zh" if rng.random() < zh_share else "en", rng)
        messages = (Message("user", question), Message("assistant", solve(problem, style)))
        out.append(Conversation(messages, f"arithmetic/{split}/{index}", "arithmetic"))
    return out


def documents(
    *, limit_bytes: int, seed: int, style: Style = "steps", lines: int = 24, three_digit_share: float = 0.05
) -> Iterator[Document]:
    """Pretraining text: pages of worked sums, trained pairs only."""
    rng = random.Random(f"{seed}:arithmetic:text")
    written = index = 0
    while written < limit_bytes:
        problems = [draw(rng, split="train", three_digit_share=three_digit_share) for _ in range(lines)]
        text = "\n".join(f"{p.a}{p.op}{p.b}=?\n{solve(p, style)}" for p in problems)
        yield Document(f"arithmetic/{index}", text, "arithmetic", "en")
        written += len(text.encode())
        index += 1
