"""The words every room shares: what a document, a conversation, a batch or a loss is.

Nothing here computes. torch is imported for type checking only, so that the command line starts at once.

Shape suffixes used throughout the code: B batch, T time, N flat tokens of a batch, S segments of a batch,
D model width, V vocabulary, H query heads, K key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool")


class UserError(Exception):
    """Something only the user can put right: a sentence, and a hint that says how. The command line exits
    with 2."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus."""

    id: str
    text: str
    source: str = ""
    lang: str = ""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool, as the assistant writes it."""

    name: str
    arguments: str
    """A JSON object, as text."""
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `content` is plain text and never trusted to hold special tokens.

    The other fields are empty but in conversations with tools.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    """What an assistant turn calls, behind its content."""
    name: str = ""
    """Of a tool turn: the tool that answers."""
    tool_call_id: str = ""
    """Of a tool turn: the call it answers; empty: the oldest one open."""
    tools: tuple[str, ...] = ()
    """Of a system turn (its content may be empty): the tools there are, each a JSON object as text,
    `{"type": "function", "function": {"name", "description", "parameters"}}`."""
    train: bool = True
    """Of an assistant turn: whether it carries loss. On disk `"weight": 0` says that it does not."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order; assistant turns are what is trained on."""

    messages: tuple[Message, ...]
    id: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Preference:
    """One pair: after `prompt`, `chosen` was preferred to `rejected` (both assistant texts)."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    id: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Ranking:
    """K >= 2 assistant texts after one prompt. `ranks[k]` of `responses[k]`: 0 is best, equal ranks are
    ties."""

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    id: str = ""
    source: str = ""

    def pairs(self) -> Iterator[Preference]:
        """Every strictly ordered pair, in the order of the responses; ties give none."""
        for i, better in enumerate(self.responses):
            for j, worse in enumerate(self.responses):
                if self.ranks[i] < self.ranks[j]:
                    yield Preference(self.prompt, better, worse, self.id, self.source)


@dataclass(frozen=True, slots=True)
class Labelled:
    """One answer that somebody called good or bad, with none to compare it with (Ethayarajh et al. 2024,
    KTO)."""

    prompt: tuple[Message, ...]
    response: str
    good: bool
    id: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Batch:
    """A flat, padding-free training batch: S segments of `lengths[s]` tokens laid end to end, N =
    sum(lengths)."""

    ids_N: Tensor
    """int64 token ids."""
    pos_N: Tensor
    """int64 position of each token in its own segment."""
    lengths: tuple[int, ...]
    """Python integers, so that nobody waits for a device to learn a shape."""
    targets_N: Tensor
    """int64 id of the next token in the segment; 0 where there is none."""
    weight_N: Tensor
    """float32 weight of each target in the loss; 0 means no loss."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A scalar with gradient and detached numbers to log. The loop adds the numbers up and logs them."""

    value: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose the next token."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability mass."""
    max_tokens: int = 256
    """New tokens at most."""
    min_tokens: int = 0
    """Stop tokens are forbidden before this many new tokens."""
    stop: tuple[str, ...] = ()
    """End when one of these texts appears; it is not part of the answer."""
    seed: int = 0
    """Draws depend on (seed, request, position) alone, never on who else is in the batch."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine generated for one request."""

    ids: tuple[int, ...]
    """New token ids, with the stop token if one ended it."""
    logprobs: tuple[float, ...]
    """Natural log-probability of each id under the distribution it was drawn from."""
    finish_reason: Literal["stop", "length", "abort"]
    text: str = ""
