"""Questions about facts in many phrasings, English and Chinese, and conversations that ask them.

An answer always repeats `name: summary` on one line. However the question was put, the model then recalls
the sentence from the same context in which pretraining showed it (`synth/pydocs.py` writes the same line),
so what has to be learned per phrasing is only which name was asked for. Phrasings are split once, here:
those in HELD_OUT are never trained, and evaluation asks nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from caravan.synth.facts import Fact
from caravan.types import Conversation, Message

TRAIN_EN: tuple[str, ...] = (
    "What does {name} do?", "What does {name}() do?", "what does {name} do", "what does {name} do?",
    "Explain {name}.", "Explain {name}", "Please explain {name}.", "explain {name} please",
    "What is {name}?", "what is {name}", "What is {name}()?", "What is {name} for?", "what is {name} for",
    "Tell me about {name}.", "tell me about {name}", "Tell me about {name}() please.",
    "Describe {name}.", "Describe {name}() in one sentence.", "Could you describe {name}?",
    "Can you explain {name}?", "Can you tell me what {name} does?", "Could you tell me what {name}() does?",
    "I want to know what {name} does.", "I would like to know about {name}.",
    "What does the function {name} do?", "What does Python's {name} do?",
    "In Python, what does {name} do?", "in python, what is {name}?", "What is the purpose of {name}?",
    "What is {name} used for?", "What is {name}() used for in Python?", "How would you describe {name}?",
    "Please tell me what {name} does.", "{name}?", "{name}", "{name}()", "What can {name} do?",
    "What happens when I call {name}?", "What happens if I call {name}()?", "Hello, what does {name} do?",
    "Hi! Can you explain {name}?", "Help me understand {name}.",
    "I found {name} in some code. What is it?", "When should I use {name}?", "Look up {name}.",
    "{name}: what does it do?", "{name} - explain it please.", "Do you know {name}?",
    "Do you know what {name} does?", "Give me a short description of {name}.",
    "Quick question: what is {name}?",
)  # fmt: skip
"""Trained English phrasings; `{name}` is the function."""

TRAIN_ZH: tuple[str, ...] = (
    "{name} 是做什么的？", "{name} 是什么？", "{name}() 是做什么的？", "请解释 {name}。", "请解释一下 {name}",
    "解释 {name}", "{name} 有什么用？", "{name} 有什么作用？", "请介绍 {name}。", "介绍一下 {name}",
    "什么是 {name}？", "你知道 {name} 吗？", "你好，{name} 是什么？", "请问 {name} 是做什么的？",
    "请问 {name} 有什么用？", "Python 里的 {name} 是做什么的？", "在 Python 中，{name} 有什么用？",
    "函数 {name} 是做什么的？", "我想知道 {name} 是做什么的。", "帮我解释 {name}。",
    "能解释一下 {name} 吗？", "{name} 怎么理解？",
)  # fmt: skip

HELD_OUT_EN: tuple[str, ...] = (
    "Could you explain what {name} is for?", "Please describe what {name} does.",
    "I need a description of {name}.", "What's {name} for?", "In one sentence, what is {name}?",
    "Can you describe the function {name}?", "Hello! Please tell me about {name}().",
    "Would you explain {name} to me?",
)  # fmt: skip
"""Never trained. Evaluation asks these about functions whose facts were taught."""

HELD_OUT_ZH: tuple[str, ...] = (
    "能介绍一下 {name} 吗？", "你好，请解释 {name}() 的作用。", "请告诉我 {name} 是什么。",
    "我想了解 {name}。",
)  # fmt: skip

LEAD_ZH = "说明如下：\n"
"""Opens every Chinese answer. The line break keeps the name after it the same tokens as at the start of a
turn."""

WHERE_EN = ("Which module has {short}?", "Where do I find {short}?", "What should I import for {short}?")
WHERE_ZH = ("{short} 在哪个模块里？", "{short} 属于哪个模块？")


def phrasings(split: str, lang: str) -> tuple[str, ...]:
    """Templates of `split` ("train" or "heldout") in `lang` ("en" or "zh")."""
    table = {
        ("train", "en"): TRAIN_EN, ("train", "zh"): TRAIN_ZH,
        ("heldout", "en"): HELD_OUT_EN, ("heldout", "zh"): HELD_OUT_ZH,
    }  # fmt: skip
    return table[split, lang]


def answer(fact: Fact, lang: str = "en") -> str:
    """The one answer that is taught for a fact, whatever the phrasing."""
    line = f"{fact.name}: {fact.summary}"
    return LEAD_ZH + line if lang == "zh" else line


def ask(fact: Fact, split: str, lang: str, rng: random.Random) -> tuple[str, str]:
    """One question drawn from the phrasings of a split, and its answer."""
    return rng.choice(phrasings(split, lang)).format(name=fact.name), answer(fact, lang)


def ask_where(fact: Fact, lang: str, rng: random.Random) -> tuple[str, str]:
    """The reverse question: which module a function is in. Only for facts of a module."""
    short = fact.name.rsplit(".", 1)[-1]
    template = rng.choice(WHERE_ZH if lang == "zh" else WHERE_EN)
    english, chinese = (
        f"{fact.name} is in the module {fact.module}.",
        f"{fact.name} 在 {fact.module} 模块里。",
    )
    reply = chinese if lang == "zh" else english
    return template.format(short=short), reply


def has_module(fact: Fact, everything: Sequence[Fact]) -> bool:
    """Whether `ask_where` has one right answer: an importable module, and no other taught function of that
    name."""
    if fact.module in ("builtins", "str", "list", "dict", "set", "int", "float"):
        return False
    short = fact.name.rsplit(".", 1)[-1]
    return sum(f.name.rsplit(".", 1)[-1] == short for f in everything) == 1


def single(question: str, reply: str, *, id: str, source: str) -> Conversation:
    """A conversation of one turn each."""
    return Conversation((Message("user", question), Message("assistant", reply)), id, source)


def joined(parts: Sequence[Conversation], *, id: str, source: str = "mixed") -> Conversation:
    """Conversations one after the other as turns of one: topics change, as they do when people talk."""
    return Conversation(tuple(m for part in parts for m in part.messages), id, source)


def fact_conversations(
    taught: Sequence[Fact], *, per_fact: int, zh_share: float, seed: int
) -> list[Conversation]:
    """`per_fact` single questions about each fact in distinct trained phrasings, `zh_share` of them Chinese.

    The draw for a fact depends on (seed, fact name) only, so adding facts changes nobody else's questions.
    """
    out: list[Conversation] = []
    for fact in taught:
        rng = random.Random(f"{seed}:{fact.name}")
        chinese = min(len(TRAIN_ZH), round(per_fact * zh_share))
        english = min(len(TRAIN_EN), per_fact - chinese)
        # The first phrasing is asked about every function: it is what people type first.
        templates = [(TRAIN_EN[0], "en")] + [(t, "en") for t in rng.sample(TRAIN_EN[1:], english - 1)]
        templates += [(t, "zh") for t in rng.sample(TRAIN_ZH, chinese)]
        for index, (template, lang) in enumerate(templates):
            question = template.format(name=fact.name)
            out.append(single(question, answer(fact, lang), id=f"fact/{fact.name}/{index}", source="fact"))
    return out


def where_conversations(taught: Sequence[Fact], *, share: float, seed: int) -> list[Conversation]:
    """Which-module questions for a `share` of the facts that have one right answer; variety, not the main
    dish."""
    rng = random.Random(f"{seed}:where")
    out: list[Conversation] = []
    for fact in taught:
        if has_module(fact, taught) and rng.random() < share:
            question, reply = ask_where(fact, rng.choice(("en", "zh")), rng)
            out.append(single(question, reply, id=f"where/{fact.name}", source="where"))
    return out
