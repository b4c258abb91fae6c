"""An asyncio client for an Octavo cluster: prompts in, tokens out, over one multiplexed stream per router.

    import asyncio
    from octavo.client import Client

    async def main() -> None:
        async with Client("127.0.0.1:50051") as client:
            async for delta in client.generate("The capital of France is", max_tokens=16):
                print(delta.text, end="", flush=True)
            answer = await client.complete([{"role": "user", "content": "And of Korea?"}], max_tokens=16)
            print(answer.text, answer.usage)

    asyncio.run(main())

Requests run side by side over one Session and do not hold each other up; leaving an ``async for`` early cancels the
request; a broken Session is attached again without a token lost or repeated. Errors are the tree in
`octavo.client.errors`.
"""

from octavo.client.answer import (
    Candidate,
    Choice,
    Completion,
    Decision,
    Delta,
    Finish,
    FinishReason,
    TokenLogprobs,
    Usage,
)
from octavo.client.backoff import Backoff
from octavo.client.client import Client
from octavo.client.errors import (
    CallError,
    ConnectionFailedError,
    DeadlineExceededError,
    FailedPreconditionError,
    FieldViolation,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    RequestCancelledError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from octavo.client.generation import Generation
from octavo.client.options import ClientOptions
from octavo.client.pooling import Classification, EmbedOptions, PoolOptions, RerankOptions
from octavo.client.request import GenerateOptions, Message, Prompt

__all__ = [
    "Backoff",
    "CallError",
    "Candidate",
    "Choice",
    "Classification",
    "Client",
    "ClientOptions",
    "Completion",
    "ConnectionFailedError",
    "DeadlineExceededError",
    "Decision",
    "Delta",
    "EmbedOptions",
    "FailedPreconditionError",
    "FieldViolation",
    "Finish",
    "FinishReason",
    "GenerateOptions",
    "Generation",
    "InternalError",
    "InvalidArgumentError",
    "Message",
    "NotFoundError",
    "PermissionDeniedError",
    "PoolOptions",
    "Prompt",
    "RequestCancelledError",
    "RerankOptions",
    "ResourceExhaustedError",
    "TokenLogprobs",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "Usage",
]
