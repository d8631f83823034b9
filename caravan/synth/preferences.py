"""Rankings to learn a reward from: one right, concise answer in the language of the question, and 1 to 3
flawed ones.

A flaw is one file-level function and one word; the order of flaws is the order of ranks, so the reward
model is told that a wrong statement is worse than an honest "I do not know", and that worse than a right
answer badly put. Flaws are drawn so that the best answer is the longer one in about half of the pairs:
length must not give it away.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from caravan.synth import arithmetic, persona, qa
from caravan.synth.facts import Fact
from caravan.types import Message, Ranking

FILLER_EN = (
    "I hope this helps you.", "There are many other things one could say here.",
    "This is a very good question.", "Please read the documentation for more.",
    "It is one of many functions.", "Let me know if you need more.",
)  # fmt: skip
FILLER_ZH = (
    "希望这对你有帮助。",
    "这是一个很好的问题。",
    "还有很多可以说的。",
    "更多内容请看文档。",
    "如有需要请再问我。",
)

UNHELPFUL_EN = (
    "I cannot answer that.",
    "Please ask something else.",
    "I am not sure.",
    "It is a function.",
    "Yes.",
)
UNHELPFUL_ZH = ("我不能回答。", "请问别的问题。", "我不确定。", "这是一个函数。", "好的。")

SEVERITY: dict[str, int] = {
    "right": 0, "wordy": 1, "repeated": 1, "language": 2, "truncated": 2, "unhelpful": 3, "wrong": 4,
}  # fmt: skip
"""Rank before gaps are closed; equal numbers are ties."""

WEIGHTS: dict[str, float] = {
    "wrong": 0.36, "wordy": 0.24, "repeated": 0.05, "language": 0.08, "truncated": 0.17, "unhelpful": 0.1,
}  # fmt: skip
"""How often each flaw is drawn."""


@dataclass(frozen=True, slots=True)
class Item:
    """A question, its right answer, the same in the other language, and how to make a wrong one."""

    id: str
    question: str
    lang: str
    right: str
    other_language: str
    wrong: Callable[[random.Random], str]


def wordy(text: str, lang: str, rng: random.Random) -> str:
    """The right answer among empty sentences."""
    filler = FILLER_ZH if lang == "zh" else FILLER_EN
    before = rng.choice(filler) + (" " if lang == "en" else "")
    after = " ".join(rng.sample(filler, rng.randint(1, 2)))
    return before + text + " " + after if rng.random() < 0.5 else text + " " + after


def repeated(text: str, rng: random.Random) -> str:
    """The right answer said two or three times."""
    return " ".join([text] * rng.randint(2, 3))


def truncated(text: str, rng: random.Random) -> str:
    """The right answer broken off somewhere after its first third."""
    return text[: max(1, int(len(text) * rng.uniform(0.35, 0.8)))].rstrip(" .。")


def wrong_sum(problem: arithmetic.Sum, style: arithmetic.Style, rng: random.Random) -> str:
    """A worked answer that goes wrong as a small model does: it solves a misread problem (half of the time),
    or
    its result is off by one, by ten, by a lost carry, or with digits swapped."""
    text = arithmetic.solve(problem, style)
    if rng.random() < 0.5:
        return arithmetic.solve(misread(problem, rng), style)
    right = problem.result
    offers = [right + d for d in (-11, -10, -2, -1, 1, 2, 10, 11)] + [int(str(right)[::-1])]
    guess = rng.choice([g for g in offers if g >= 0 and g != right])
    return text[: len(text) - len(str(right))] + str(guess)


def misread(problem: arithmetic.Sum, rng: random.Random) -> arithmetic.Sum:
    """The problem with one digit of one number read as another, and with another
    result; never a pair kept for evaluation."""
    while True:
        numbers = [str(problem.a), str(problem.b)]
        which = rng.randrange(2)
        place = rng.randrange(len(numbers[which]))
        digits = list(numbers[which])
        digits[place] = str(rng.randrange(10))
        numbers[which] = "".join(digits)
        a, b = map(int, numbers)
        found = arithmetic.Sum(a, problem.op, b) if problem.op == "+" or a >= b else arithmetic.Sum(b, "-", a)
        if found.result != problem.result and not arithmetic.held_out(found.a, found.b):
            return found


def fact_item(fact: Fact, taught: Sequence[Fact], split: str, lang: str, rng: random.Random) -> Item:
    """A question about a fact; a wrong answer carries the sentence of another function, of the same module
    if any."""
    question, right = qa.ask(fact, split, lang, rng)
    near = [f for f in taught if f.module == fact.module and f.name != fact.name]

    def wrong(draw: random.Random) -> str:
        other = draw.choice(near if near and draw.random() < 0.7 else taught)
        while other.summary == fact.summary:
            other = draw.choice(taught)
        name = fact.name if draw.random() < 0.75 else other.name
        return qa.answer(Fact(name, other.summary, fact.module), lang)

    other_language = qa.answer(fact, "en" if lang == "zh" else "zh")
    return Item(f"fact/{fact.name}", question, lang, right, other_language, wrong)


def sum_item(split: str, style: arithmetic.Style, lang: str, rng: random.Random, name: str) -> Item:
    """A question about a sum of the split's pairs."""
    problem = arithmetic.draw(rng, split=split)
    question = arithmetic.ask(problem, lang, rng)
    right = arithmetic.solve(problem, style)
    # A number has no language; the wrong language of a sum is therefore a lead-in of the other one.
    other = f"The answer: {right}" if lang == "zh" else f"{qa.LEAD_ZH}{right}"
    return Item(name, question, lang, right, other, lambda draw: wrong_sum(problem, style, draw))


def persona_items(split: str) -> list[Item]:
    """Questions of `persona.TOPICS`; a wrong answer is that of another topic in the same language."""
    items = []
    for topic in persona.TOPICS:
        peers = [t.reply for t in persona.TOPICS if t.lang == topic.lang and t.name != topic.name]
        translated = next(t.reply for t in persona.TOPICS if t.name == topic.name and t.lang != topic.lang)
        for index, question in enumerate(topic.train if split == "train" else topic.held_out):
            name = f"persona/{topic.name}/{topic.lang}/{index}"
            wrong = _choice_of(peers)
            items.append(Item(name, question, topic.lang, topic.reply, translated, wrong))
    return items


def _choice_of(options: Sequence[str]) -> Callable[[random.Random], str]:
    return lambda draw: draw.choice(options)


def _flawed(kind: str, item: Item, rng: random.Random) -> str:
    if kind == "wrong":
        return item.wrong(rng)
    if kind == "wordy":
        return wordy(item.right, item.lang, rng)
    if kind == "repeated":
        return repeated(item.right, rng)
    if kind == "language":
        return item.other_language
    if kind == "truncated":
        return truncated(item.right, rng)
    return rng.choice(UNHELPFUL_ZH if item.lang == "zh" else UNHELPFUL_EN)


def rank(item: Item, k: int, rng: random.Random) -> Ranking:
    """`k` different answers to one question in shuffled order; ranks close up from 0 (the right one)."""
    answers: dict[str, int] = {item.right: SEVERITY["right"]}
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    while len(answers) < k:
        kind = rng.choices(kinds, weights)[0]
        answers.setdefault(_flawed(kind, item, rng), SEVERITY[kind])
    listed = list(answers.items())
    rng.shuffle(listed)
    levels = sorted({severity for _, severity in listed})
    prompt = (Message("user", item.question),)
    ranks = tuple(levels.index(severity) for _, severity in listed)
    return Ranking(prompt, tuple(text for text, _ in listed), ranks, item.id, "synth")


def rankings(
    count: int, taught: Sequence[Fact], *, seed: int, split: str = "train", style: arithmetic.Style = "steps",
    zh_share: float = 0.3,
) -> list[Ranking]:  # fmt: skip
    """`count` rankings of a split, no question twice: about 45 % facts, 42 % sums, the rest talk.

    The splits share no question: phrasings and pairs of numbers are divided where they are defined.
    """
    rng = random.Random(f"{seed}:preferences:{split}")
    talk = persona_items(split)
    rng.shuffle(talk)
    out: list[Ranking] = []
    asked: set[str] = set()
    while len(out) < count:
        lang = "zh" if rng.random() < zh_share else "en"
        kind = rng.random()
        if kind < 0.45:
            item = fact_item(rng.choice(taught), taught, split, lang, rng)
        elif kind < 0.87 or not talk:
            item = sum_item(split, style, lang, rng, f"arithmetic/{len(out)}")
        else:
            item = talk.pop()
        if item.question in asked:
            continue
        asked.add(item.question)
        made = rank(item, rng.choice((2, 2, 3, 4)), rng)
        out.append(Ranking(made.prompt, made.responses, made.ranks, f"{split}/{len(out)}/{item.id}", "synth"))
    return out
