"""TLS at the front door: who gets through, what a certificate says, and that a renewed one needs no restart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from octavo.client import Client
from octavo.client.errors import CallError
from octavo.v1.inference_service_pb2_grpc import InferenceServiceStub

from load_tests.rigs.certificates import Authority, Certified
from router import key_file
from router.config import RouterConfig
from router.keyring import Keyring
from router.server import RouterServer
from router.tls import CertificateSource
from tests.router.rig import FakeBackend, Outcome, Rig, answering, read_generate, running, served_model, text_request
from workers.errors import ConfigError

AUTHORITY = Authority()


def server_files(folder: Path, by: Authority = AUTHORITY, name: str = "server") -> dict[str, str]:
    certificate, key = by.server().write(folder, name)
    return {"tls_cert_file": certificate, "tls_key_file": key}


def client_ca(folder: Path) -> dict[str, str]:
    path = folder / "ca.crt"
    path.write_bytes(AUTHORITY.certificate)
    return {"tls_client_ca_file": str(path)}


def credentials(own: Certified | None = None, ca: Authority = AUTHORITY) -> grpc.ChannelCredentials:
    if own is None:
        return grpc.ssl_channel_credentials(ca.certificate)
    return grpc.ssl_channel_credentials(ca.certificate, own.key, own.certificate)


@asynccontextmanager
async def dialled(rig: Rig, own: grpc.ChannelCredentials) -> AsyncIterator[InferenceServiceStub]:
    rig.backend.script = answering("ok")
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(rig.address, own, options) as channel:
        yield InferenceServiceStub(channel)


async def send(rig: Rig, own: grpc.ChannelCredentials, *metadata: tuple[str, str]) -> Outcome:
    async with dialled(rig, own) as stub:
        return await read_generate(stub.Generate(text_request(), timeout=10, metadata=metadata))


async def test_the_client_library_speaks_tls_and_others_get_nowhere(tmp_path: Path) -> None:
    async with running(**server_files(tmp_path)) as rig:
        rig.backend.script = answering("ok")
        async with Client(rig.address, credentials=credentials()) as client:
            assert (await client.complete("hi", timeout=10)).text == "ok"
        for wrong in (None, credentials(ca=Authority("another"))):
            async with Client(rig.address, credentials=wrong) as client:
                with pytest.raises(CallError):
                    await client.complete("hi", timeout=0.5)


async def test_several_ports_speak_tls(tmp_path: Path) -> None:
    """A router under Serve has two. gRPC takes credentials with a source of certificates for one port only: the second
    could not be bound."""
    config = RouterConfig(**server_files(tmp_path))
    server = RouterServer(config, {"toy": served_model()}, FakeBackend(), router_id="router-1", version="0.0")
    ports = [server.bind("127.0.0.1", 0) for _ in range(2)]
    await server.start()
    try:
        for port in ports:
            async with Client(f"127.0.0.1:{port}", credentials=credentials()) as client:
                assert await client.health()
    finally:
        await server.stop()


async def test_a_certificate_says_who_calls(tmp_path: Path) -> None:
    async with running(**server_files(tmp_path), **client_ca(tmp_path)) as rig:
        for tenant in ("spiffe://example.org/acme", "tenant:other"):
            outcome = await send(rig, credentials(AUTHORITY.client(tenant)))
            assert outcome.code is grpc.StatusCode.OK
            assert rig.backend.works[-1].request.tenant == tenant
            assert rig.backend.works[-1].request.salt


@pytest.mark.parametrize("names", [(), ("tenant:a", "tenant:b"), ("tenant:" + "x" * 128,)])
async def test_a_certificate_must_say_one_tenant(tmp_path: Path, names: tuple[str, ...]) -> None:
    async with running(**server_files(tmp_path), **client_ca(tmp_path)) as rig:
        outcome = await send(rig, credentials(AUTHORITY.client(*names)))
        assert outcome.code is grpc.StatusCode.UNAUTHENTICATED
        assert "subject alternative name" in outcome.message
        assert not rig.backend.works


async def test_without_a_certificate_of_the_authority_there_is_no_connection(tmp_path: Path) -> None:
    stranger = Authority("stranger").client("tenant:acme")
    async with running(**server_files(tmp_path), **client_ca(tmp_path)) as rig:
        for own in (credentials(), credentials(stranger)):
            assert (await send(rig, own)).code is grpc.StatusCode.UNAVAILABLE
        assert not rig.backend.works


async def test_certificate_and_token_must_agree(tmp_path: Path) -> None:
    tokens = {}

    def add(tenant: str) -> Any:
        def edit(keyring: Keyring) -> Keyring:
            keyring, _, tokens[tenant] = keyring.with_key(tenant, time.time())
            return keyring

        return edit

    path = tmp_path / "keys.json"
    for tenant in ("tenant:a", "tenant:b"):
        key_file.change(path, add(tenant))
    own = credentials(AUTHORITY.client("tenant:a"))
    async with running(**server_files(tmp_path), **client_ca(tmp_path), keys_file=str(path)) as rig:
        bearers = [("authorization", f"Bearer {tokens[tenant]}") for tenant in ("tenant:a", "tenant:b")]
        assert (await send(rig, own)).code is grpc.StatusCode.OK, "the certificate is enough"
        assert (await send(rig, own, bearers[0])).code is grpc.StatusCode.OK
        assert (await send(rig, own, bearers[1])).code is grpc.StatusCode.PERMISSION_DENIED
        assert (await send(rig, own, ("authorization", "Bearer x"))).code is grpc.StatusCode.UNAUTHENTICATED
        assert {work.request.tenant for work in rig.backend.works} == {"tenant:a"}


async def test_a_renewed_certificate_is_used_by_new_connections(tmp_path: Path) -> None:
    new = Authority("new")
    async with running(**server_files(tmp_path)) as rig, dialled(rig, credentials()) as old_stub:
        assert (await read_generate(old_stub.Generate(text_request()))).code is grpc.StatusCode.OK
        await asyncio.to_thread(server_files, tmp_path, new)
        assert (await send(rig, credentials(ca=new))).code is grpc.StatusCode.OK
        assert (await read_generate(old_stub.Generate(text_request()))).code is grpc.StatusCode.OK, "not cut off"


def test_a_broken_renewal_leaves_the_last_good_certificate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = server_files(tmp_path)
    source = CertificateSource(RouterConfig(**files))
    assert source.changed() is None
    other = server_files(tmp_path, name="other")
    for broken in (b"", b"no certificate", Path(other["tls_key_file"]).read_bytes()):
        Path(files["tls_key_file"]).write_bytes(broken)
        assert source.changed() is None
        assert "stay as they were" in caplog.records[-1].message
    server_files(tmp_path)
    assert source.changed() is not None


@pytest.mark.parametrize("key", ["tls_cert_file", "tls_key_file", "tls_client_ca_file"])
def test_files_that_are_no_certificates_are_refused_at_the_start(tmp_path: Path, key: str) -> None:
    files = {**server_files(tmp_path), **client_ca(tmp_path)}
    Path(files[key]).write_text("nothing")
    with pytest.raises(ConfigError, match="PEM"):
        CertificateSource(RouterConfig(**files))
    Path(files[key]).unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        CertificateSource(RouterConfig(**files))


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"tls_cert_file": "c"}, "given together"),
        ({"tls_key_file": "k"}, "given together"),
        ({"tls_client_ca_file": "a"}, "needs router.tls_cert_file"),
        ({"keys_file": "k", "tenant_header": "x-tenant"}, "tenant_header must be empty"),
    ],
)
def test_what_does_not_go_together_is_refused(config: dict[str, str], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        RouterConfig(**config).check()
