"""GenerateRequest to `Request`: every rule that a request must keep, so that nobody downstream checks anything again.

All violations of one request are reported together, each with its field, the rule and the value. A field that no engine
of this release serves is refused with its name (NotServedError), never ignored. Defaults are filled in here. Knows
neither calls nor Sessions; what came beside the message is in its `Envelope`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from octavo.names import Reason
from octavo.v1.inference_service_pb2 import GenerateRequest
from octavo.v1.types_pb2 import TRUNCATE_NONE, TRUNCATE_UNSPECIFIED

from router.choice import Choice
from router.config import RouterConfig
from router.dispatch_errors import model_error
from router.identity import ANYBODY, Identity
from router.model import Models, ServedModel, UnservedModel
from router.prompt import is_quick, prompt_ids
from router.received import MAX_INLINE_RECEIVED, check_received, new_choices, num_received
from router.sampling import check_format, check_sampling, make_sampling
from router.types import Request
from router.violations import Violations, check_token_ids, shown
from workers.errors import NotFoundError, NotServedError, Violation

MAX_ID_BYTES = 128
MAX_STOP_TOKEN_IDS = 256
MAX_PRIORITY = 100
MAX_LOGPROBS = 20
"""Alternatives of each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What came with a GenerateRequest: in the call's metadata for Generate, in its Start for Session."""

    request_id: str
    accepted_at: float
    deadline: float
    """Both on ``time.monotonic``, in seconds."""
    has_own_deadline: bool = False
    """Whether the client brought it."""
    identity: Identity = ANYBODY
    traceparent: str = ""
    tracestate: str = ""
    is_session: bool = False


class Accepted(NamedTuple):
    """A valid request, and what of it is the front's business alone."""

    request: Request
    choices: list[Choice]
    """All that are generated, as they begin."""
    num_choices: int
    """How many of them are the answer."""
    sends_logprobs: bool


class Validator:
    """Checks requests for the models that one router serves."""

    def __init__(self, config: RouterConfig, models: Models) -> None:
        self._config = config
        self._models = models

    def is_quick(self, message: GenerateRequest) -> bool:
        """Whether `accept` will do without suspending."""
        return is_quick(message.prompt) and num_received(message) <= MAX_INLINE_RECEIVED

    async def accept(self, message: GenerateRequest, envelope: Envelope, *, traceparent: str) -> Accepted:
        """Return the valid request. `traceparent`: of the span that the back's spans shall belong to.

        Raises NotFoundError, InvalidRequestError, NotServedError or CapabilityError.
        """
        name, model = self.model(message.model)
        violations = Violations()
        self._check_fields(message, envelope, model, violations)
        check_sampling(message.sampling, model, violations)
        asked = message.response_format if message.HasField("response_format") else None
        if asked is not None:
            check_format(asked, violations)
        _check_not_served(message, violations)
        num_choices, num_generated = self._check_choices(message, violations)
        prompt = await prompt_ids(message.prompt, model, violations)
        max_tokens = self._check_length(message, prompt, model, violations)
        received = check_received(message, num_choices, num_generated, model, violations)
        violations.raise_if_any()
        num_logprobs = message.logprobs if message.HasField("logprobs") else None
        if num_generated > num_choices and num_logprobs is None:
            num_logprobs = 0
        eos_token_ids = () if message.ignore_eos else model.manifest.eos_token_ids
        request = Request(
            request_id=envelope.request_id,
            model=name,
            prompt=prompt,
            received=received,
            sampling=make_sampling(message.sampling, asked),
            max_tokens=max_tokens,
            min_tokens=message.min_tokens,
            n=num_generated,
            num_logprobs=num_logprobs,
            stop_token_ids=frozenset((*eos_token_ids, *message.stop_token_ids)),
            priority=message.priority,
            affinity_key=message.affinity_key,
            tenant=envelope.identity.tenant,
            salt=envelope.identity.salt,
            deadline=envelope.deadline,
            has_own_deadline=envelope.has_own_deadline,
            accepted_at=envelope.accepted_at,
            traceparent=traceparent,
            tracestate=envelope.tracestate,
        )
        choices = await new_choices(request, message.stop, model, violations)
        violations.raise_if_any()
        return Accepted(request, choices, num_choices, message.HasField("logprobs"))

    def model(self, name: str) -> tuple[str, ServedModel]:
        """Return a served model and its name, which may be left out where there is one. Raises NotFoundError,
        NotServedError for an adapter, or UnavailableError for a model that cannot be served."""
        if not name and len(self._models) == 1:
            (name,) = self._models
        model = self._models.get(name)
        if isinstance(model, UnservedModel):
            raise model_error(name, model.failure)
        if model is not None:
            return name, model
        base, _, adapter = name.rpartition(":")
        if base in self._models:
            raise NotServedError(
                f"model: adapters are not served by this release, asked for {shown(adapter)} of {base}",
                violations=[Violation("model", f"adapters are not served by this release, is {shown(name)}")],
            )
        served = ", ".join(sorted(self._models)) or "none"
        rule = f"must be one of the served models ({served})"
        raise NotFoundError(
            f"model: {rule}, is {shown(name)}",
            reason=Reason.MODEL_NOT_FOUND,
            violations=[Violation("model", f"{rule}, is {shown(name)}")],
        )

    def _check_fields(
        self, message: GenerateRequest, envelope: Envelope, model: ServedModel, violations: Violations
    ) -> None:
        check = violations.require
        if message.HasField("max_tokens"):
            check(message.max_tokens >= 1, "max_tokens", "must be >= 1", message.max_tokens)
        if message.HasField("logprobs"):
            in_range = 0 <= message.logprobs <= MAX_LOGPROBS
            check(in_range, "logprobs", f"must be in [0, {MAX_LOGPROBS}]", message.logprobs)
        if message.stop:
            self._check_stop(message.stop, violations)
        if message.stop_token_ids:
            count = len(message.stop_token_ids)
            check(count <= MAX_STOP_TOKEN_IDS, "stop_token_ids", f"must have at most {MAX_STOP_TOKEN_IDS} ids", count)
            check_token_ids(message.stop_token_ids[:MAX_STOP_TOKEN_IDS], "stop_token_ids", model, violations)
        if message.priority:
            in_range = -MAX_PRIORITY <= message.priority <= MAX_PRIORITY
            check(in_range, "priority", f"must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]", message.priority)
        if message.affinity_key:
            size = len(message.affinity_key.encode())
            check(size <= MAX_ID_BYTES, "affinity_key", f"must have at most {MAX_ID_BYTES} bytes", size)
        if own_id := message.client_request_id:
            size = len(own_id.encode())
            if not envelope.is_session:
                check(size <= MAX_ID_BYTES, "client_request_id", f"must have at most {MAX_ID_BYTES} bytes", size)
            elif own_id != envelope.request_id:
                rule = f"must be empty or equal to Start.request_id ({shown(envelope.request_id)})"
                check(False, "client_request_id", rule, own_id)

    def _check_stop(self, strings: Sequence[str], violations: Violations) -> None:
        limit, max_bytes = self._config.max_stop_strings, self._config.max_stop_bytes
        violations.require(len(strings) <= limit, "stop", f"must have at most {limit} strings", len(strings))
        for i, stop in enumerate(strings[: limit + 1]):
            size = len(stop.encode())
            if not 1 <= size <= max_bytes:
                violations.require(False, f"stop[{i}]", f"must have 1 to {max_bytes} bytes", size)

    def _check_choices(self, message: GenerateRequest, violations: Violations) -> tuple[int, int]:
        """Return how many choices are the answer, and how many are generated for it."""
        limit = self._config.max_choices
        n = message.n if message.HasField("n") else 1
        violations.require(1 <= n <= limit, "n", f"must be in [1, {limit}]", n)
        best_of = message.best_of if message.HasField("best_of") else n
        if message.HasField("best_of"):
            violations.require(n <= best_of <= limit, "best_of", f"must be in [n = {n}, {limit}]", best_of)
        return n, best_of

    def _check_length(
        self, message: GenerateRequest, prompt: list[int], model: ServedModel, violations: Violations
    ) -> int:
        """Return max_tokens with its default filled in; min_tokens goes by it."""
        max_tokens = self._check_max_tokens(message, prompt, model, violations)
        if not 0 <= message.min_tokens <= max(max_tokens, 0):
            violations.require(False, "min_tokens", f"must be in [0, {max_tokens}], max_tokens", message.min_tokens)
        return max_tokens

    def _check_max_tokens(
        self, message: GenerateRequest, prompt: list[int], model: ServedModel, violations: Violations
    ) -> int:
        limit = model.manifest.max_model_len
        left = limit - len(prompt)
        if left < 1:
            rule = f"must have at most {limit - 1} tokens (the model's context is {limit})"
            violations.require(False, "prompt", rule, f"{len(prompt)} tokens", reason=Reason.PROMPT_TOO_LONG)
        if not message.HasField("max_tokens"):
            return max(1, min(self._config.default_max_tokens, left))
        if 1 <= left < limit and message.max_tokens > left:
            rule = f"prompt ({len(prompt)} tokens) + max_tokens must be <= {limit}, the model's context"
            violations.require(False, "max_tokens", rule, message.max_tokens, reason=Reason.PROMPT_TOO_LONG)
        return message.max_tokens


def _check_not_served(message: GenerateRequest, violations: Violations) -> None:
    violations.serve(
        message.truncate in (TRUNCATE_UNSPECIFIED, TRUNCATE_NONE), "truncate", "any value other than TRUNCATE_NONE"
    )
