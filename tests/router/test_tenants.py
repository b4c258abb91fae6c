"""Who pays: the tenant header of Generate and Session calls, and the deadline that a client brought or did not."""

from __future__ import annotations

import grpc
import pytest
from octavo.client import Client, ClientOptions
from octavo.names import Reason

from router.config import RouterConfig
from router.identity import ANYBODY, SALT_BYTES, Identities
from router.keyring import MAX_NAME_BYTES
from tests.router.rig import Rig, answering, running, text_request
from workers.errors import ConfigError, InvalidRequestError

HEADER = "x-octavo-tenant"


async def send(rig: Rig, way: str, *metadata: tuple[str, str]) -> tuple[str, bytes]:
    """Return tenant and salt of what the back is given."""
    rig.backend.script = answering("ok")
    if way == "generate":
        outcome = await rig.generate(text_request(), metadata=metadata)
    else:
        async with rig.open_session(metadata=metadata) as session:
            await session.start("s", text_request())
            outcome = await session.outcome("s")
    assert outcome.code is grpc.StatusCode.OK
    request = rig.backend.works[-1].request
    return request.tenant, request.salt


@pytest.mark.parametrize("way", ["generate", "session"])
async def test_without_a_configured_header_everybody_is_one_tenant(way: str) -> None:
    async with running() as rig:
        assert await send(rig, way, (HEADER, "acme")) == ("", b"")


@pytest.mark.parametrize("way", ["generate", "session"])
async def test_each_tenant_has_a_salt_of_its_own(way: str) -> None:
    async with running(tenant_header=HEADER) as rig:
        acme, other = await send(rig, way, (HEADER, "acme")), await send(rig, way, (HEADER, "other"))
        assert (acme[0], other[0]) == ("acme", "other")
        assert len(acme[1]) == SALT_BYTES
        assert acme[1] != other[1]
        assert await send(rig, way, (HEADER, "acme")) == acme
        assert await send(rig, way) == ("", b""), "who sends none is the one without a name"


@pytest.mark.parametrize("way", ["generate", "session"])
@pytest.mark.parametrize("values", [["acme", "other"], ["x" * (MAX_NAME_BYTES + 1)]])
async def test_what_is_no_tenant_is_refused(way: str, values: list[str]) -> None:
    metadata = [(HEADER, value) for value in values]
    async with running(tenant_header=HEADER) as rig:
        call = rig.stub.Generate(text_request(), metadata=metadata) if way == "generate" else None
        call = call or rig.stub.Session(metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert f"metadata[{HEADER}]: must" in (caught.value.details() or "")
        assert not rig.backend.works
        await rig.assert_nothing_left()


def test_names_of_tenants() -> None:
    identities = Identities(HEADER, salt_key=b"key")
    assert identities.of([]) == identities.of([(HEADER, "")]) == ANYBODY
    assert identities.of([("other", "a"), (HEADER, "A b-c")]).tenant == "A b-c"
    assert Identities(HEADER, salt_key=b"another").of([(HEADER, "a")]) != identities.of([(HEADER, "a")])
    for name in ("é", "a\nb", "x" * 129):
        with pytest.raises(InvalidRequestError, match="printable ASCII") as caught:
            identities.of([(HEADER, name)])
        assert caught.value.reason == Reason.INVALID_FIELD


@pytest.mark.parametrize("key", ["X-Tenant", "tenant-bin", "grpc-tenant", ":path", "a b", "x" * 65])
def test_a_header_that_is_no_metadata_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"router\.tenant_header must"):
        RouterConfig(tenant_header=key).check()


async def test_the_client_sends_its_metadata_with_every_call() -> None:
    async with running(tenant_header=HEADER) as rig:
        rig.backend.script = answering("ok")
        async with Client(rig.address, options=ClientOptions(metadata=((HEADER, "acme"),))) as client:
            await client.complete("hi")
            assert (await client.list_models())[0].name == "toy"
            await client.status()
            assert await client.health()
            assert await client.detokenize(await client.tokenize("hi")) == "hi"
        assert rig.backend.works[0].request.tenant == "acme"


@pytest.mark.parametrize(
    ("key", "value"),
    [("", "a"), ("A", "a"), ("a-bin", "a"), ("grpc-a", "a"), ("a", "é"), ("a", "x\n"), ("a", "x" * 1025)],
)
def test_metadata_that_cannot_be_sent_is_refused(key: str, value: str) -> None:
    with pytest.raises(ValueError, match="metadata: "):
        ClientOptions(metadata=((key, value),)).check()


def test_a_value_that_is_sent_may_be_a_secret() -> None:
    options = ClientOptions(metadata=(("authorization", "Bearer geheim\u00e9"),))
    with pytest.raises(ValueError, match="the value of authorization must") as caught:
        options.check()
    assert "geheim" not in f"{caught.value}{options}"


async def test_a_deadline_of_the_routers_own_is_none_of_the_clients() -> None:
    async with running() as rig:
        rig.backend.script = answering("ok")
        await rig.generate(text_request(), timeout=5)
        await rig.generate(text_request(), timeout=None)
        await rig.session(text_request())
        async with Client(rig.address) as client:
            await client.complete("hi", timeout=5)
        assert [work.request.has_own_deadline for work in rig.backend.works] == [True, False, False, True]
