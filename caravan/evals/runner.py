"""Puts a model before the tasks: generates, scores, adds up. Which task is which is never asked, only its
KIND.

Order and draws are fixed (tasks by name, items as they stand in their files, seeds by position), so two
models' results can be compared item by item (`evals/compare.py`) and a second run gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from caravan.data.render import render, render_pair
from caravan.data.shards import Shards
from caravan.data.tokenizer import Tokenizer
from caravan.engine.engine import Engine
from caravan.evals import likelihood
from caravan.evals.items import Item, Result, metrics_of
from caravan.evals.likelihood import Scored
from caravan.evals.stats import Interval, bootstrap, wilson
from caravan.model.decoder import Decoder
from caravan.model.heads import PooledHead, RewardModel
from caravan.types import Completion, Message, Sampling, UserError

Report = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with the tokenizer it was trained with."""

    model: Decoder
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class Judge:
    """A reward model with its tokenizer."""

    model: RewardModel
    tokenizer: Tokenizer


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is asked."""

    questions: int = 0
    """Questions per task at most; 0 asks all."""
    max_tokens: int = 0
    """New tokens per answer at most; 0 leaves it to the task."""
    text_tokens: int = 60_000
    """Held-out tokens read for bits per byte; 0 reads all."""
    sampled: int = 64
    """Prompts answered at temperature 1 for reward and KL."""
    sampled_tokens: int = 64
    """New tokens of such an answer at most."""
    shown: int = 8
    """Texts kept per task."""
    parallel: int = 32
    """Answers generated side by side."""
    seed: int = 0


@dataclass(slots=True)
class World:
    """Everything an evaluation may need; what is None makes the tasks that need it drop out."""

    subject: Subject
    items: list[Item]
    shards: Shards | None = None
    judge: Judge | None = None
    reference: Decoder | None = None
    limits: Limits = field(default_factory=Limits)
    report: Report = lambda *_, **__: None
    results: list[Result] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    answers: list[tuple[Item, list[int], Completion]] | None = None
    """(item, prompt ids, answer) sampled at temperature 1, made once for all tasks that want them."""


def evaluate(world: World, tasks: dict[str, Any]) -> None:
    """Run every task (name -> module) the world has the means for; fills `results` and `samples`."""
    for name in sorted(tasks):
        task = tasks[name]
        if task.KIND not in RUN:
            raise UserError(f"task {name} is of kind {task.KIND!r}", f"kinds are {', '.join(sorted(RUN))}")
        RUN[task.KIND](world, name, task)


def _limited(world: World, items: list[Item]) -> list[Item]:
    return items[: world.limits.questions] if world.limits.questions else items


def _note(world: World, what: str, count: int = 1) -> None:
    world.notes[what] = world.notes.get(what, 0) + count


def _prompt_ids(world: World, messages: Sequence[Message], room: int) -> list[int]:
    """The served prompt; one that leaves no room for an answer loses its beginning (counted)."""
    ids = render(messages, world.subject.tokenizer, generation_prompt=True).ids
    most = max(1, world.subject.model.spec.context - room)
    if len(ids) > most:
        _note(world, "prompts_cut")
        ids = ids[-most:]
    return ids


def _engine(world: World) -> Engine:
    tokenizer, model = world.subject.tokenizer, world.subject.model
    return Engine(
        model, stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size, decode=tokenizer.decode,
        max_seqs=world.limits.parallel,
    )  # fmt: skip


def generate(world: World, prompts: list[list[int]], sampling: Sampling, name: str) -> list[Completion]:
    """One answer per prompt, in order, reported as it goes. Draws depend on seed and position alone."""
    engine, out = _engine(world), []
    step = 4 * world.limits.parallel
    for start in range(0, len(prompts), step):
        world.report(start, len(prompts), f"answers to {name}")
        # generate() numbers its requests from 0: another seed per chunk, or all chunks would draw alike
        draws = replace(sampling, seed=sampling.seed + (start << 20))
        out += [found[0] for found in engine.generate(prompts[start : start + step], draws)]
    world.report(len(prompts), len(prompts), f"answers to {name}")
    return out


def _keep(world: World, name: str, item: Item, text: str, scores: dict[str, float], shown: int) -> None:
    if shown < world.limits.shown:
        prompt = [{"role": m.role, "content": m.content} for m in item.messages]
        row = {"task": name, "id": item.id, "prompt": prompt, "answer": text, "reference": item.reference}
        world.samples.append({**row, "scores": scores})


def _run_generate(world: World, name: str, task: Any) -> None:
    items = _limited(world, task.load(world.items))
    if not items:
        return
    most = world.limits.max_tokens or task.MAX_TOKENS
    room = min(most, world.subject.model.spec.context // 2)
    prompts = [_prompt_ids(world, task.prompt(item), room) for item in items]
    answers = generate(world, prompts, Sampling(temperature=0.0, max_tokens=most), name)
    _note(world, "answers_without_end", sum(a.finish_reason == "length" for a in answers))
    for index, (item, answer) in enumerate(zip(items, answers, strict=True)):
        scores = task.score(item, answer.text)
        for metric, value in scores.items():
            world.results.append(Result(metric, item.id, value, 1.0, task.CHECKED, item.kind))
        _keep(world, name, item, answer.text, scores, index)


def _run_choices(world: World, name: str, task: Any) -> None:
    items = _limited(world, task.load(world.items))
    sequences = [s for item in items for s in _choice_sequences(world, task.prompt(item))]
    found = likelihood.logprobs(
        world.subject.model, sequences, report=lambda a, b: world.report(a, b, f"tokens of {name}")
    )
    sums = [float(logp.sum()) for logp in found]
    at = 0
    for item in items:
        ll = sums[at : at + len(item.choices)]
        at += len(item.choices)
        for metric, value in task.score(item, ll).items():
            world.results.append(Result(metric, item.id, value, 1.0, task.CHECKED, item.kind))


def _choice_sequences(world: World, prompt: Any) -> list[Scored]:
    """Prompt and continuation ids per choice; too long ones lose their beginning."""
    tokenizer, context = world.subject.tokenizer, world.subject.model.spec.context
    pairs: list[tuple[list[int], list[int]]] = []
    if prompt.context is None:
        before = render(prompt.messages, tokenizer, generation_prompt=True).ids
        pairs = [(before, tokenizer.encode(text)) for text in prompt.continuations]
    else:
        for text in prompt.continuations:
            spaces = len(prompt.context) - len(prompt.context.rstrip())
            head = prompt.context[: len(prompt.context) - spaces]
            before = tokenizer.encode(head)
            whole = tokenizer.encode(head + prompt.context[len(head) :] + text)
            pairs.append((before, whole[len(before) :]))
    start = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    out = []
    for before, after in pairs:
        ids = [*(before or ([start] if start is not None else [])), *after]
        if not after or len(after) == len(ids):
            raise UserError("a choice is empty", "give every choice at least one character")
        if len(ids) > context:
            _note(world, "prompts_cut")
            ids = ids[-context:]
        out.append(Scored(ids, max(1, len(ids) - len(after))))
    return out


def _run_text(world: World, name: str, task: Any) -> None:
    if world.shards is None:
        return
    tokenizer, context = world.subject.tokenizer, world.subject.model.spec.context
    if world.shards.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"the shards were made with {world.shards.vocab_size} ids and the model's tokenizer has "
            f"{tokenizer.vocab_size}",
            "give shards made with the tokenizer of this model",
        )
    texts = list(task.load(world.shards, tokenizer, world.limits.text_tokens))
    windows: list[Scored] = []
    counts = []
    for text in texts:
        cut = [text.ids[at : at + context] for at in range(0, len(text.ids) - 1, context - 1)]
        windows += [Scored(ids, 1) for ids in cut]
        counts.append(len(cut))
    found = likelihood.logprobs(
        world.subject.model, windows, report=lambda a, b: world.report(a, b, f"tokens of {name}")
    )
    at = 0
    for text, count in zip(texts, counts, strict=True):
        nats = -sum(float(logp.sum()) for logp in found[at : at + count])
        at += count
        world.results.append(Result(name, text.id, *task.score(text, nats)))


def _sampled(world: World) -> list[tuple[Item, list[int], Completion]]:
    """Answers at temperature 1 to an even draw of the questions, made at the first call."""
    if world.answers is None:
        limits = world.limits
        asked = [item for item in world.items if not item.choices]
        step = max(1.0, len(asked) / max(1, limits.sampled))
        chosen = [asked[int(i * step)] for i in range(min(limits.sampled, len(asked)))]
        room = min(limits.sampled_tokens, world.subject.model.spec.context // 2)
        prompts = [_prompt_ids(world, item.messages, room) for item in chosen]
        sampling = Sampling(temperature=1.0, max_tokens=limits.sampled_tokens, seed=limits.seed)
        answers = generate(world, prompts, sampling, "sampled prompts")
        world.answers = list(zip(chosen, prompts, answers, strict=True))
        for index, (item, answer) in enumerate(zip(chosen, answers, strict=True)):
            _keep(world, "sampled", item, answer.text, {}, index)
    return world.answers


def _latest(ids: list[int], context: int, judge: RewardModel) -> list[int]:
    """The end of what a judge is given, as long as it reads; the first token stays if it is asked there."""
    if len(ids) <= context:
        return ids
    kept = 1 if isinstance(judge.score, PooledHead) and judge.score.reads == "first" else 0
    return ids[:kept] + ids[len(ids) - context + kept :]


def _run_reward(world: World, name: str, task: Any) -> None:
    if world.judge is None:
        return
    answers = _sampled(world)
    context = world.judge.model.decoder.spec.context
    pairs = [render_pair(item.messages, a.text, world.judge.tokenizer).ids for item, _, a in answers]
    found = likelihood.rewards(world.judge.model, [_latest(ids, context, world.judge.model) for ids in pairs])
    for (item, _, _), reward in zip(answers, found, strict=True):
        for metric, value in task.score(reward).items():
            world.results.append(Result(metric, item.id, value))


def _run_compare(world: World, name: str, task: Any) -> None:
    if world.reference is None:
        return
    if world.reference.spec.vocab != world.subject.model.spec.vocab:
        raise UserError(
            "model and reference have vocabularies of different size", "KL needs one tokenizer for both"
        )
    answers = _sampled(world)
    sequences = [Scored([*prompt, *answer.ids], len(prompt)) for _, prompt, answer in answers]
    found = likelihood.divergence(
        world.subject.model, world.reference, sequences, vocab=world.subject.tokenizer.vocab_size
    )
    for (item, _, _), (logp, logq, exact) in zip(answers, found, strict=True):
        for metric, value in task.score(logp.tolist(), logq.tolist(), exact.tolist()).items():
            world.results.append(Result(metric, item.id, value))


RUN: dict[str, Callable[[World, str, Any], None]] = {
    "generate": _run_generate, "choices": _run_choices, "text": _run_text, "reward": _run_reward,
    "compare": _run_compare,
}  # fmt: skip
"""How each kind of task is run."""


def summarise(
    results: Sequence[Result], *, resamples: int, seed: int, level: float = 0.95
) -> dict[str, Interval]:
    """Metric -> value with interval; per kind of question too (`exact_match.fact`)."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        for metric in metrics_of(result.task, result.kind):
            groups.setdefault(metric, []).append(result)
    return {metric: _interval(members, resamples, seed, level) for metric, members in sorted(groups.items())}


def _interval(members: Sequence[Result], resamples: int, seed: int, level: float) -> Interval:
    if all(r.binary for r in members):
        return wilson(sum(r.score for r in members), len(members), level)
    scores = [r.score for r in members]
    weights = None if all(r.weight == 1.0 for r in members) else [r.weight for r in members]
    return bootstrap(scores, weights, seed=seed, resamples=resamples, level=level)
