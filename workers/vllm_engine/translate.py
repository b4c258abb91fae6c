"""Works in, vLLM's arguments out; vLLM's outputs in, ours out. Pure: no vLLM is imported here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from workers.types import Finish, FinishReason, GenerateWork, TokenLogprobs

FORMATS: Final = {"json_object": "json_object", "json_schema": "json", "regex": "regex", "grammar": "grammar"}
"""What vLLM calls the fields of octavo.v1.ResponseFormat."""
REFUSAL: Final = "VLLMClientError"
MAX_WORDS: Final = 200
_MIX: Final = 0x9E3779B97F4A7C15
_MAX_SEED: Final = (1 << 63) - 1


def prompt_of(work: GenerateWork, index: int) -> list[int]:
    """Return what vLLM shall continue for one choice: what was received is part of it."""
    return [*work.prompt, *(work.received[index] if work.received else ())]


def num_received(work: GenerateWork, index: int) -> int:
    return len(work.received[index]) if work.received else 0


def sampling_of(work: GenerateWork, index: int) -> dict[str, Any]:
    """Return the arguments of vLLM's SamplingParams for one choice.

    A seed gives the same answer again. vLLM numbers its draws from where it begins, so that an answer that goes on
    after `received` tokens draws otherwise than one that was never interrupted: its seed is another one, too, or the
    first draws would be repeated.
    """
    sampling, done = work.sampling, num_received(work, index)
    arguments: dict[str, Any] = {
        "temperature": sampling.temperature,
        "max_tokens": work.max_tokens - done,
        "min_tokens": max(work.min_tokens - done, 0),
        "stop_token_ids": sorted(work.stop_token_ids),
        "ignore_eos": True,  # whoever asks has put the model's own into stop_token_ids
    }
    if not sampling.is_greedy:
        arguments["seed"] = _seed(sampling.seed, index, done)
        arguments |= {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p}
    if sampling.has_penalties:
        arguments |= {
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
        }
    if sampling.logit_bias:
        arguments["logit_bias"] = dict(sampling.logit_bias)
    if sampling.format is not None:
        kind, text = sampling.format
        arguments["structured"] = {FORMATS[kind]: text if text else True}
    if work.num_logprobs is not None:
        arguments["logprobs"] = work.num_logprobs
    return arguments


def logprobs_of(
    token_ids: Sequence[int], found: Sequence[Mapping[int, Any]] | None, number: int | None
) -> tuple[TokenLogprobs, ...]:
    """Return the log probabilities of tokens, each with the `number` likeliest at its place; None: none at all."""
    if number is None or found is None:
        return ()
    return tuple(_token_logprobs(token, at, number) for token, at in zip(token_ids, found, strict=True))


def _token_logprobs(token: int, found: Mapping[int, Any], number: int) -> TokenLogprobs:
    likeliest = sorted(found.items(), key=lambda item: item[1].rank if item[1].rank is not None else len(found))
    return TokenLogprobs(found[token].logprob, tuple((other, at.logprob) for other, at in likeliest[:number]))


def finish_of(reason: str | None, stop_reason: int | str | None, token_ids: Sequence[int]) -> Finish | None:
    """Return why a choice has ended by vLLM's words, without times; None: it has not."""
    if reason is None:
        return None
    if reason == "stop":
        stop = stop_reason if isinstance(stop_reason, int) else token_ids[-1] if token_ids else None
        return Finish(reason=FinishReason.STOP, stop_token_id=stop)
    if reason == "length":
        return Finish(reason=FinishReason.LENGTH)
    if reason == "abort":
        return Finish(reason=FinishReason.CANCELLED)
    return Finish(reason=FinishReason.ERROR, error_reason="INTERNAL", error_message=f"vLLM ended it: {reason}")


def refusal_of(error: Exception) -> str | None:
    """Return why vLLM turned a request down that it has looked at, in its words; None: that is not what happened.

    Its error for this is a ValueError (0.26) or one of a class of its own (from 0.27 on, where a grammar's is still a
    ValueError, and the cause of another error)."""
    for found in (error, error.__cause__):
        if isinstance(found, ValueError) or any(kind.__name__ == REFUSAL for kind in type(found).__mro__):
            return (str(found).strip() or type(found).__name__).splitlines()[0][:MAX_WORDS]
    return None


def _seed(seed: int, index: int, done: int) -> int:
    mixed = seed + index * _MIX + done * (_MIX >> 7)
    return mixed & _MAX_SEED
