"""docs/errors.md: every reason that an error can have, its gRPC code, what it means and whether to try again."""

from __future__ import annotations

from octavo.reasons import CATALOGUE

from scripts.reference.markdown import code, table

INTRODUCTION = """\
# Errors

Each failed request ends with one gRPC status (Generate) or one Terminal (Session). A status has
`google.rpc.ErrorInfo` with `reason` and the domain `octavo`, in the trailer `grpc-status-details-bin`; a Terminal has
the same fields. `BadRequest` names fields that break rules, `RetryInfo` says when to come back. Reasons are stable
across releases; messages are for people.

*Retry?* says whether the same request may succeed. `octavo.client` tries again by itself while an answer has not
begun, and takes one that has begun up again after a lost connection (`CallError.retryable` says the same of an error
that it raises).
"""


def page() -> str:
    rows = [
        (code(reason), code(about.code), f"{about.meaning}.", about.retry.value) for reason, about in CATALOGUE.items()
    ]
    return INTRODUCTION + "\n" + table(("reason", "gRPC code", "meaning", "retry?"), rows)
