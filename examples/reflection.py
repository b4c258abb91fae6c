"""Call a cluster without any .proto file: what it serves and how is asked of itself, by gRPC's server reflection.

    python examples/reflection.py HOST:PORT                              list services and methods
    python examples/reflection.py HOST:PORT octavo.v1.InferenceService/Generate '{"prompt": {"text": "Hi"}}'

As with `grpcurl -plaintext`, requests and answers are JSON, an answer a message. A method that takes a stream of
requests takes several, as further arguments. Needs grpcio-reflection.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

TIMEOUT_S = 60.0


def list_methods(channel: grpc.Channel) -> None:
    services = ProtoReflectionDescriptorDatabase(channel)
    pool = DescriptorPool(services)
    for name in sorted(services.get_services()):
        print(name)
        for method in pool.FindServiceByName(name).methods:
            sent = f"{'stream ' * method.client_streaming}{method.input_type.name}"
            got = f"{'stream ' * method.server_streaming}{method.output_type.name}"
            print(f"    {method.name}({sent}) returns ({got})")


def call(channel: grpc.Channel, path: str, requests: list[str]) -> None:
    """Raises grpc.RpcError with the call's status."""
    service, _, name = path.partition("/")
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    method = pool.FindServiceByName(service).FindMethodByName(name)
    messages = [json_format.Parse(text, GetMessageClass(method.input_type)()) for text in requests]
    for message in _answers(channel, method, path, messages):
        print(json_format.MessageToJson(message, indent=None))


def _answers(channel: grpc.Channel, method: MethodDescriptor, path: str, requests: list) -> Iterable:
    """Call a method of any of the four kinds; an answer that is no stream is one message."""
    sends = "stream" if method.client_streaming else "unary"
    gets = "stream" if method.server_streaming else "unary"
    answer_class = GetMessageClass(method.output_type)
    invoke = getattr(channel, f"{sends}_{gets}")(
        f"/{path}",
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=answer_class.FromString,
    )
    answer = invoke(iter(requests) if method.client_streaming else requests[0], timeout=TIMEOUT_S)
    return answer if method.server_streaming else [answer]


def main(address: str = "127.0.0.1:50051", path: str = "", *requests: str) -> int:
    with grpc.insecure_channel(address) as channel:
        try:
            if path:
                call(channel, path, list(requests or ("{}",)))
            else:
                list_methods(channel)
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
