"""The one table of spans: which process makes each, under which parent, linked to what, with which attributes.

Standard library only, and read by nothing but documentation and tests: those hold the spans of a running cluster
against it, so that neither has what the other lacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from octavo.names import Attribute, Event, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What is to be said of one kind of span."""

    name: str
    by: str
    """The process that makes it."""
    about: str
    """From when to when it lasts, without a full stop."""
    parent: str
    links: str = ""
    always: tuple[str, ...]
    """Attributes that each has."""
    sometimes: tuple[str, ...] = ()
    """Attributes that are there where they say something: of an error, of a request that asks for it."""
    events: tuple[str, ...] = ()


_SERVER: Final = (
    Attribute.RPC_SYSTEM,
    Attribute.RPC_SERVICE,
    Attribute.RPC_METHOD,
    Attribute.RPC_GRPC_STATUS_CODE,
    Attribute.OPERATION_NAME,
    Attribute.REQUEST_MODEL,
    Attribute.REQUEST_ID,
    Attribute.ROUTER,
    Attribute.OUTPUT_TOKENS,
    Attribute.CACHED_INPUT_TOKENS,
    Attribute.FINISH_REASONS,
)
_ACCEPTED: Final = (
    Attribute.REQUEST_MAX_TOKENS,
    Attribute.REQUEST_TEMPERATURE,
    Attribute.PRIORITY,
    Attribute.INPUT_TOKENS,
    Attribute.REPLICA,
    Attribute.ATTEMPT,
    Attribute.TIME_TO_FIRST_TOKEN,
    Attribute.ERROR_TYPE,
)
_WORK: Final = (Attribute.REQUEST_ID, Attribute.ATTEMPT, Attribute.REPLICA)
_STEPS: Final = (Attribute.FIRST_STEP, Attribute.LAST_STEP)

CATALOGUE: Final = (
    Kind(
        name=Span.GENERATE,
        by="router",
        about="A Generate call, from its arrival until its end",
        parent="what the client's traceparent says",
        always=_SERVER,
        sometimes=_ACCEPTED,
        events=("exception",),
    ),
    Kind(
        name=Span.SESSION_REQUEST,
        by="router; the client makes one of kind CLIENT with this name before it",
        about="A request of a Session, from its Start until its Terminal",
        parent="the client's span, whose traceparent is in the Start",
        always=_SERVER,
        sometimes=_ACCEPTED,
        events=("exception",),
    ),
    *(
        Kind(
            name=name,
            by="router",
            about=f"A call of {name.rpartition('/')[2]}, from its arrival until its end; inputs are requests below it",
            parent="what the client's traceparent says",
            always=_SERVER,
            sometimes=_ACCEPTED,
            events=("exception",),
        )
        for name in (Span.EMBED, Span.SCORE, Span.RERANK, Span.CLASSIFY)
    ),
    Kind(
        name=Span.ACCEPT,
        by="router",
        about="Identity, validation and tokenizing, until the request is queued or refused",
        parent="the server span",
        always=(Attribute.REQUEST_ID,),
        sometimes=(Attribute.INPUT_TOKENS, Attribute.ERROR_TYPE),
    ),
    Kind(
        name=Span.QUEUE,
        by="router",
        about="A request's wait in the router; one before each attempt",
        parent="the server span",
        always=(Attribute.REQUEST_ID, Attribute.ROUTER, Attribute.PRIORITY, Attribute.INPUT_TOKENS),
        sometimes=(Attribute.WAIT_NO_REPLICA, Attribute.WAIT_FULL, Attribute.ERROR_TYPE),
        events=(Event.RESUMED,),
    ),
    Kind(
        name=Span.DISPATCH,
        by="router",
        about="One attempt at a replica, from the decision which until its end",
        parent="the server span",
        links="the attempt before it",
        always=(
            *_WORK,
            Attribute.RULE,
            Attribute.MATCHED_TOKENS,
            Attribute.CANDIDATES,
            Attribute.BATCH_ID,
        ),
        sometimes=(Attribute.ERROR_TYPE,),
    ),
    Kind(
        name=Span.BATCH,
        by="router",
        about="What goes to one replica together, from the decision until it was sent",
        parent="none",
        links=f"the {Span.DISPATCH} of each sampled request in it",
        always=(Attribute.BATCH_ID, Attribute.ROUTER, Attribute.BATCH_REQUESTS, Attribute.BATCH_TOKENS),
    ),
    Kind(
        name=Span.ENGINE_QUEUE,
        by="replica",
        about="From the work's arrival until its first step",
        parent=Span.DISPATCH,
        always=_WORK,
        sometimes=(Attribute.ERROR_TYPE,),
    ),
    Kind(
        name=Span.PREFILL,
        by="replica",
        about="From the work's first step until its first token",
        parent=Span.DISPATCH,
        always=(*_WORK, Attribute.INPUT_TOKENS, Attribute.CACHED_INPUT_TOKENS, Attribute.NUM_STEPS),
        sometimes=(*_STEPS, Attribute.RECEIVED_TOKENS, Attribute.ERROR_TYPE),
        events=(Event.CACHE_HIT, Event.SLOWEST_STEP, Event.PREEMPTED, Event.READMITTED),
    ),
    Kind(
        name=Span.DECODE,
        by="replica",
        about="From the first token until the last; of several choices that of the one that took longest",
        parent=Span.DISPATCH,
        always=(*_WORK, Attribute.OUTPUT_TOKENS, Attribute.NUM_PREEMPTIONS, Attribute.NUM_STEPS),
        sometimes=(*_STEPS, Attribute.FINISH_REASONS, Attribute.ERROR_TYPE),
        events=(Event.SLOWEST_STEP, Event.PREEMPTED, Event.READMITTED),
    ),
    Kind(
        name=Span.STEP,
        by="replica",
        about="One step of the engine; one that failed says so in its status, with the type of the exception",
        parent="none",
        links=f"the {Span.DISPATCH} of each sampled request in it",
        always=(
            Attribute.STEP,
            Attribute.REPLICA,
            Attribute.STEP_DURATION,
            Attribute.STEP_SEQUENCES,
            Attribute.STEP_TOKENS,
            Attribute.STEP_SCHEDULE_TIME,
            Attribute.STEP_RUN_TIME,
            Attribute.STEP_SAMPLE_TIME,
            Attribute.STEP_EMIT_TIME,
        ),
        sometimes=(Attribute.UNTOLD_STEPS, Attribute.ERROR_TYPE),
        events=(Event.EVICTED,),
    ),
    Kind(
        name=Span.DELIVER,
        by="router",
        about="From the last token at the router until it and the end were sent to the client",
        parent="the server span",
        always=(Attribute.REQUEST_ID,),
    ),
    Kind(
        name=Span.SCALE,
        by="octavo-signal",
        about="A change of the number of replicas; it has no duration",
        parent="none",
        always=(
            Attribute.REQUEST_MODEL,
            Attribute.REPLICAS_BEFORE,
            Attribute.REPLICAS_TARGET,
            Attribute.SCALE_REASON,
            Attribute.SCALE_DEMAND,
        ),
    ),
)
"""In the order in which a request meets them."""

EVENT_ATTRIBUTES: Final[dict[str, tuple[str, ...]]] = {
    Event.RESUMED: (Attribute.ERROR_TYPE, Attribute.RECEIVED_TOKENS),
    Event.CACHE_HIT: (Attribute.CACHED_INPUT_TOKENS,),
    Event.EVICTED: (Attribute.EVICTED_BLOCKS,),
    Event.PREEMPTED: (Attribute.STEP,),
    Event.READMITTED: (Attribute.STEP,),
    Event.SLOWEST_STEP: (Attribute.STEP, Attribute.STEP_DURATION),
}
"""What each event says."""
