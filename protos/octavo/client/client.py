"""The client as its user sees it: requests, which `Flights` carries over Sessions, and the calls that are not requests.

Does not read the environment. Sends to routers only; which replica answers is their decision.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc
import grpc.aio
from google.protobuf import wrappers_pb2

from octavo.client import pooling
from octavo.client.answer import Completion
from octavo.client.errors import CallError, ConnectionFailedError, UnavailableError, from_rpc
from octavo.client.exchange import Exchange
from octavo.client.flights import Flights
from octavo.client.generation import Generation
from octavo.client.options import ClientOptions
from octavo.client.pooling import CallOptions, Classification, EmbedOptions, PoolOptions, RerankOptions
from octavo.client.request import GenerateOptions, Prompt, check_start, make_prompt, make_request
from octavo.names import Reason
from octavo.v1 import model_service_pb2, model_service_pb2_grpc, status_service_pb2, status_service_pb2_grpc

_T = TypeVar("_T")

_PING_TIMEOUT_MS = 10_000


class Client:
    """A cluster's client, used as ``async with Client("host:port") as client``, on one event loop.

    `target` is a router's address or several; each gets one Session, and requests go to the address with the least of
    them. With `credentials` the connection is TLS, without it is plain text.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        credentials: grpc.ChannelCredentials | None = None,
        options: ClientOptions | None = None,
    ) -> None:
        self._targets = (target,) if isinstance(target, str) else tuple(dict.fromkeys(target))
        if not self._targets:
            raise ValueError("target must name at least one address, is empty")
        self._credentials = credentials
        self._options = options or ClientOptions()
        self._options.check()
        self._flights: Flights | None = None
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._is_open = False

    async def __aenter__(self) -> Self:
        if self._flights is not None:
            raise RuntimeError("a client can be opened once")
        self._flights = Flights(self._targets, self._options, dial=self._dial)
        self._is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what still runs and close every connection, within about `close_timeout_s`. Idempotent."""
        self._is_open = False
        if self._flights is not None:
            await self._flights.close()
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    # Requests.

    def generate(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        timeout: float | None = None,
        request_id: str | None = None,
        traceparent: str = "",
        tracestate: str = "",
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Begin a request; read its answer from what is returned. Call it on the client's event loop.

        `timeout` (seconds, from now) bounds the request as a whole, retries included. `request_id` names it in logs
        and traces; a random one by default. Raises InvalidArgumentError for what cannot be sent or an id in use,
        ResourceExhaustedError for a request over `max_message_bytes`; everything else is raised while reading.
        """
        flights = self._check_open()
        request_id = uuid.uuid4().hex if request_id is None else request_id
        check_start(request_id, timeout=timeout, traceparent=traceparent, tracestate=tracestate)
        request = make_request(prompt, model=model, options=options)
        changed = asyncio.Event()
        exchange = Exchange(
            request_id,
            request,
            window=self._options.window,
            deadline=None if timeout is None else asyncio.get_running_loop().time() + timeout,
            changed=changed.set,
        )
        trace_id = flights.begin(exchange, traceparent=traceparent, tracestate=tracestate)
        return Generation(exchange, flights, changed, trace_id=trace_id)

    async def complete(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        timeout: float | None = None,  # noqa: ASYNC109 - it travels to the router and the engine
        request_id: str | None = None,
        traceparent: str = "",
        tracestate: str = "",
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Generate and return the whole answer at once. Arguments and errors are those of `generate`."""
        generation = self.generate(
            prompt,
            model=model,
            timeout=timeout,
            request_id=request_id,
            traceparent=traceparent,
            tracestate=tracestate,
            **options,
        )
        return await generation.complete()

    # Numbers for texts: see pooling.py for the options. Errors are those of a request; `timeout` is in seconds.

    async def embed(
        self,
        inputs: Sequence[Prompt],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - it travels on
        **options: Unpack[EmbedOptions],
    ) -> list[list[float]]:
        """Return a vector for each input, a text or token ids."""
        return await self._ask(pooling.embed(inputs, self._call_options(timeout), options))

    async def score(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - it travels on
        **options: Unpack[PoolOptions],
    ) -> list[float]:
        """Return how well the two texts of each pair fit."""
        return await self._ask(pooling.score(pairs, self._call_options(timeout), options))

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - it travels on
        **options: Unpack[RerankOptions],
    ) -> list[tuple[int, float]]:
        """Return the places of the documents that fit best and their scores, the best one first."""
        return await self._ask(pooling.rerank(query, documents, self._call_options(timeout), options))

    async def classify(
        self,
        inputs: Sequence[Prompt],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - it travels on
        **options: Unpack[PoolOptions],
    ) -> list[Classification]:
        """Return what each input is, or each of its tokens."""
        return await self._ask(pooling.classify(inputs, self._call_options(timeout), options))

    def _call_options(self, timeout: float | None) -> CallOptions:
        return CallOptions(timeout, self._options.metadata)

    # The other calls. Each tries one address after the other, takes `call_timeout_s` at most, and raises CallError.

    async def list_models(self) -> list[model_service_pb2.Model]:
        """Return what the cluster serves."""

        async def call(channel: grpc.aio.Channel) -> list[model_service_pb2.Model]:
            stub: model_service_pb2_grpc.ModelServiceAsyncStub = model_service_pb2_grpc.ModelServiceStub(channel)
            response = await stub.ListModels(
                model_service_pb2.ListModelsRequest(),
                timeout=self._options.call_timeout_s,
                metadata=self._options.metadata,
            )
            return list(response.models)

        return await self._ask(call)

    async def tokenize(self, prompt: Prompt, *, model: str = "") -> list[int]:
        """Return the token ids that `generate` would use for this prompt."""
        request = model_service_pb2.TokenizeRequest(model=model, prompt=make_prompt(prompt))

        async def call(channel: grpc.aio.Channel) -> list[int]:
            stub: model_service_pb2_grpc.ModelServiceAsyncStub = model_service_pb2_grpc.ModelServiceStub(channel)
            return list(
                (
                    await stub.Tokenize(request, timeout=self._options.call_timeout_s, metadata=self._options.metadata)
                ).token_ids
            )

        return await self._ask(call)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        skip_special_tokens: bool = True,
    ) -> str:
        """Return the text of these tokens."""
        request = model_service_pb2.DetokenizeRequest(
            model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )

        async def call(channel: grpc.aio.Channel) -> str:
            stub: model_service_pb2_grpc.ModelServiceAsyncStub = model_service_pb2_grpc.ModelServiceStub(channel)
            return (
                await stub.Detokenize(request, timeout=self._options.call_timeout_s, metadata=self._options.metadata)
            ).text

        return await self._ask(call)

    async def status(self) -> status_service_pb2.GetStatusResponse:
        """Return what the cluster is doing, as the first router that answers sees it."""

        async def call(channel: grpc.aio.Channel) -> status_service_pb2.GetStatusResponse:
            stub: status_service_pb2_grpc.StatusServiceAsyncStub = status_service_pb2_grpc.StatusServiceStub(channel)
            return await stub.GetStatus(
                status_service_pb2.GetStatusRequest(),
                timeout=self._options.call_timeout_s,
                metadata=self._options.metadata,
            )

        return await self._ask(call)

    async def find_requests(self, name: str) -> list[status_service_pb2.RequestRecord]:
        """Return what the router that answers knows of the request, or the requests of the trace, with this id; of
        its own tenant's alone. Raises NotFoundError if it remembers none; another router may."""
        request = status_service_pb2.GetRequestRecordRequest(id=name)

        async def call(channel: grpc.aio.Channel) -> list[status_service_pb2.RequestRecord]:
            stub: status_service_pb2_grpc.StatusServiceAsyncStub = status_service_pb2_grpc.StatusServiceStub(channel)
            response = await stub.GetRequestRecord(
                request, timeout=self._options.call_timeout_s, metadata=self._options.metadata
            )
            return list(response.records)

        return await self._ask(call)

    async def slowest_requests(
        self, number: int = 10, *, model: str = ""
    ) -> status_service_pb2.ListRequestRecordsResponse:
        """Return the slowest requests that the router which answers remembers, of one model or all."""
        request = status_service_pb2.ListRequestRecordsRequest(max_records=number, model=model)

        async def call(channel: grpc.aio.Channel) -> status_service_pb2.ListRequestRecordsResponse:
            stub: status_service_pb2_grpc.StatusServiceAsyncStub = status_service_pb2_grpc.StatusServiceStub(channel)
            return await stub.ListRequestRecords(
                request, timeout=self._options.call_timeout_s, metadata=self._options.metadata
            )

        return await self._ask(call)

    async def health(self, service: str = "") -> bool:
        """Return whether a router says SERVING for `service` ("" is the whole of it)."""

        async def call(channel: grpc.aio.Channel) -> bool:
            # HealthCheckRequest{string service = 1} and HealthCheckResponse{enum status = 1} look on the wire like
            # these wrappers, which saves everybody who installs the client one more distribution.
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=wrappers_pb2.StringValue.SerializeToString,
                response_deserializer=wrappers_pb2.Int32Value.FromString,
            )
            status: wrappers_pb2.Int32Value = await check(
                wrappers_pb2.StringValue(value=service),
                timeout=self._options.call_timeout_s,
                metadata=self._options.metadata,
            )
            return status.value == 1

        return await self._ask(call)

    async def _ask(self, call: Callable[[grpc.aio.Channel], Awaitable[_T]]) -> _T:
        links = self._check_open().links
        last: CallError | None = None
        for link in sorted(links, key=lambda link: not link.is_fit):
            channel = self._channels.get(link.target)
            if channel is None:
                channel = self._channels[link.target] = self._dial(link.target)
            try:
                return await call(channel)
            except grpc.aio.AioRpcError as error:
                last = from_rpc(error)
                if not isinstance(last, UnavailableError):
                    raise last from None
                if not last.reason:  # no router of ours says UNAVAILABLE without a reason
                    message = f"cannot reach {link.target}: {last.message}"
                    last = ConnectionFailedError(message, reason=Reason.SESSION_LOST)
        assert last is not None
        raise last

    def _check_open(self) -> Flights:
        if self._flights is None or not self._is_open:
            raise RuntimeError("the client is not open; use it as `async with Client(target) as client`")
        return self._flights

    def _dial(self, target: str) -> grpc.aio.Channel:
        """Make a channel with a connection of its own."""
        options = self._options
        arguments: list[tuple[str, int]] = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.min_reconnect_backoff_ms", round(options.connect_timeout_s * 1000)),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.keepalive_time_ms", round(options.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
            # A keepalive ping that waits for the answer to one of another kind has that one's limit, else a minute.
            ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),
            ("grpc.max_send_message_length", options.max_message_bytes),
            ("grpc.max_receive_message_length", options.max_message_bytes),
            ("grpc.enable_retries", 0),
        ]
        if self._credentials is None:
            return grpc.aio.insecure_channel(target, options=arguments)
        return grpc.aio.secure_channel(target, self._credentials, options=arguments)
