"""Answers where the data has none: the model's own, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from calibration.conversation import Conversation
from calibration.sweep import State, Sweep, size
from graphs.dialogue import DECODER
from graphs.program import Program

#: of the caches of conversations that the model answers at a time
STATE_BYTES = 1 << 30


def last(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The decoder's logits at the last position: whole ones, of all prompts, are more than the memory holds."""
    return tuple(output[:, -1:].clone() for output in outputs)


def answer_greedily(
    program: Program, conversations: Sequence[Conversation], steps: int, ends: Sequence[int], say: Callable[[str], None]
) -> None:
    """Give each conversation the model's own answer, of `steps` tokens at most; those that `ends` lists are none.

    As many at a time as `STATE_BYTES` hold the caches of.
    """
    if not conversations or not steps:
        return
    decoder = Sweep(program, DECODER)
    caches = sum(size(decoder.fetch_attr(name)) for name in decoder.states)
    many = max(1, STATE_BYTES // max(1, caches))
    for start in range(0, len(conversations), many):
        going = [(conversation, State()) for conversation in conversations[start : start + many]]
        say(f"answers of samples {start + 1} to {start + len(going)}, which have none")
        for _ in range(steps):
            calls = []
            for conversation, state in going:
                conversation.rehearse()
                calls.append(conversation.calls[DECODER][-1 if state else 0 :])
            outputs = decoder.sweep(calls, take=last, states=[state for _, state in going])
            answered, going = zip(going, outputs, strict=True), []
            for (conversation, state), made in answered:
                token = int(made[-1][0][0, -1].argmax())
                if token not in ends:
                    conversation.answer.append(token)
                    going.append((conversation, state))
