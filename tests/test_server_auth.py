"""Who is let in, and to what."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from serving import Running, follow
from starlette.requests import Request

from pgchan import AsyncClient, InvalidInput
from pgchan.server import Insecure, TokenAuth, create_app
from pgchan.server.auth import OPERATIONS, compile_pattern

SECRET = "s" * 32
EDWARDS = ed25519.Ed25519PrivateKey.generate()
CURVE = ec.generate_private_key(ec.SECP256R1())


def pem(key: Any) -> bytes:
    text: bytes = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return text


KEYS = {"secret": SECRET, "edwards": EDWARDS.public_key(), "curve": pem(CURVE.public_key())}

# Every route: method, path, body, and the operation that it needs.
ROUTES = [
    ("GET", "/channels/chat/42", None, "read"),
    ("HEAD", "/channels/chat/42", None, "read"),
    ("POST", "/channels/chat/42", {"body": 1}, "publish"),
    ("DELETE", "/channels/chat/42", None, "manage"),
    ("GET", "/runs/chat/42", None, "read"),
    ("GET", "/runs/chat/42/result", None, "read"),
    ("GET", "/runs/chat/42/journal", None, "manage"),
    ("POST", "/runs/chat/42/signals", {"body": 1}, "signal"),
    ("POST", "/runs/chat/42/cancel", None, "cancel"),
    ("POST", "/runs/chat/42/resume", None, "manage"),
    ("POST", "/runs/chat/42/fork", {"step": "s", "id": "chat/42"}, "manage"),
    ("POST", "/runs", {"workflow": "work", "id": "chat/42"}, "start"),
]


def token(
    channels: Any = None, *, key: Any = SECRET, algorithm: str = "HS256", header: Any = None, **claims: Any
) -> str:  # fmt: skip
    """A valid token for everything, but for what is said otherwise; a claim that is None is left out."""
    granted = {"**": sorted(OPERATIONS)} if channels is None else channels
    all_claims = {
        "sub": "user-42", "aud": "pgchan", "exp": time.time() + 600,
        "pgchan": {"channels": granted, "workflows": ["work"]}, **claims,
    }  # fmt: skip
    kept = {name: value for name, value in all_claims.items() if value is not None}
    return jwt.encode(kept, key, algorithm=algorithm, headers={"kid": "secret"} if header is None else header)


def unsigned(**header: Any) -> str:
    """A token without a signature, under a header that says anything."""
    _, claims, _ = token().split(".")
    return f"{jwt.utils.base64url_encode(json.dumps({'typ': 'JWT', **header}).encode()).decode()}.{claims}."


def confused() -> str:
    """A token signed by HS256 with the text of a public key, which everybody knows."""
    head, claims, _ = token(header={"kid": "curve"}).split(".")
    signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(
        f"{head}.{claims}".encode(), pem(CURVE.public_key())
    )
    return f"{head}.{claims}.{jwt.utils.base64url_encode(signature).decode()}"


@pytest.fixture
async def nowhere() -> AsyncIterator[AsyncClient]:
    """A client of a database that cannot be reached: an answer other than 503 was given without asking it."""
    client = AsyncClient("postgresql://nobody@127.0.0.1:1/nothing", timeout=0.01)
    yield client
    await client.close()


def calling(app: Any, bearer: str | None = None) -> httpx.AsyncClient:
    headers = {} if bearer is None else {"Authorization": f"Bearer {bearer}"}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver", headers=headers)


async def statuses(app: Any, bearer: str | None) -> set[int]:
    """What all routes answer."""
    async with calling(app, bearer) as http:
        return {(await http.request(method, path, json=body)).status_code for method, path, body, _ in ROUTES}


# ---- who


async def test_without_auth_everything_is_denied(nowhere: AsyncClient) -> None:
    app = create_app(nowhere)
    assert await statuses(app, None) == await statuses(app, token()) == {401}
    async with calling(app) as http:
        for path in ("/healthz", "/pgchan.js", "/nothing", "/", "/runs"):
            assert (await http.get(path)).status_code == 401


async def test_a_valid_token_is_let_in(nowhere: AsyncClient) -> None:
    app = create_app(nowhere, auth=TokenAuth(keys=KEYS))
    for bearer in [
        token(), token(header={}), token(aud=["other", "pgchan"]),
        token(key=EDWARDS, algorithm="EdDSA", header={"kid": "edwards"}),
        token(key=CURVE, algorithm="ES256", header={"kid": "curve"}),
        token(exp=time.time() - 20), token(nbf=time.time() + 20),  # clocks differ
        token(exp=time.time() + 3600), token({f"c/{n}": ["read"] for n in range(63)} | {"**": sorted(OPERATIONS)}),
    ]:  # fmt: skip
        assert await statuses(app, bearer) == {503}


@pytest.mark.parametrize(
    "bearer",
    [
        None, "", "nonsense", "a.b.c", "x" * 9_000, token()[:-2], token(key="t" * 32),
        token(key="s" * 64, algorithm="HS512"),
        unsigned(alg="none"), unsigned(alg="none", kid="secret"), unsigned(alg="HS256"), confused(),
        token(header={"kid": "../../dev/null"}), token(header={"kid": "/etc/passwd"}), token(header={"kid": "unknown"}),
        token(header={"kid": "edwards"}), token(key=EDWARDS, algorithm="EdDSA", header={"kid": "curve"}),
        token(key=ec.generate_private_key(ec.SECP256R1()), algorithm="ES256", header={"kid": "curve"}),
        token(key=rsa.generate_private_key(65537, 2048), algorithm="RS256"), token(header={"crit": ["b64"]}),
        token(exp=time.time() - 60), token(exp=time.time() + 7200), token(exp=True), token(exp="soon"),
        token(exp=1e300), token(exp=str(int(time.time()) + 60)),
        token(nbf=time.time() + 1800), token(iat=time.time() + 1800), token(aud="other"), token(aud=["other"]),
        token(sub=""), token(sub=7), token(exp=None), token(sub=None), token(aud=None), token(pgchan=None),
        token(pgchan={}), token(pgchan=[]), token(pgchan={"workflows": []}), token(pgchan={"channels": []}),
        token(pgchan={"channels": {}, "admin": True}), token(pgchan={"channels": {}, "workflows": "work"}),
        token({"c": ["read", "fly"]}), token({"c": "read"}), token({"c": [1]}), token({"a*": ["read"]}),
        token({"**/a": ["read"]}), token({"a/**b": ["read"]}), token({f"c/{n}": ["read"] for n in range(65)}),
    ],
)  # fmt: skip
async def test_anything_else_is_nobody(nowhere: AsyncClient, bearer: str | None) -> None:
    app = create_app(nowhere, auth=TokenAuth(keys=KEYS))
    assert await statuses(app, bearer) == {401}
    async with calling(app, bearer) as http:
        for accept in ("application/json", "text/event-stream"):
            response = await http.get("/channels/c", headers={"Accept": accept})
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
            assert response.json()["code"] == "unauthorized"


async def test_a_token_counts_in_the_header_alone(nowhere: AsyncClient) -> None:
    async with calling(create_app(nowhere, auth=TokenAuth(keys=KEYS))) as http:
        for name in ("token", "access_token", "ticket"):
            assert (await http.get("/channels/c", params={name: token()})).status_code == 401
        for value in (token(), f"Basic {token()}", f"Bearer{token()}"):
            assert (await http.get("/channels/c", headers={"Authorization": value})).status_code == 401
        assert (await http.get("/channels/c", headers={"Authorization": f"bearer {token()}"})).status_code == 503


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("s" * 31, "at least 32 bytes, not 31"), ({}, "at least one key"), ([], "at least one key"), (7, "int"),
        (pem(rsa.generate_private_key(65537, 2048).public_key()), "Ed25519 or P-256"), ("-----BEGIN x", "PEM"),
        (ec.generate_private_key(ec.SECP384R1()).public_key(), "P-256"),
        (EDWARDS.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), "public one"),
        (CURVE.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH), "not the text of a public key"),
    ],
)  # fmt: skip
def test_an_unfit_key_is_refused_at_once(keys: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        TokenAuth(keys=keys)


async def test_one_key_and_several_without_names_will_do(nowhere: AsyncClient) -> None:
    new = "n" * 40
    for keys in (SECRET, SECRET.encode(), [new, SECRET]):
        app = create_app(nowhere, auth=TokenAuth(keys=keys))
        assert await statuses(app, token(header={})) == {503}
        assert await statuses(app, token(header={"kid": "secret"})) == {401}  # it picks none of these


# ---- what


@pytest.mark.parametrize(("method", "path", "body", "operation"), ROUTES)
async def test_a_route_needs_its_operation_and_no_other(
    nowhere: AsyncClient, method: str, path: str, body: Any, operation: str
) -> None:
    app = create_app(nowhere, auth=TokenAuth(keys=KEYS))
    needed = {operation, "start"} if path.endswith("/fork") else {operation}
    for grant, status in [(needed, 503), (OPERATIONS - {operation}, 403), (OPERATIONS - needed, 403)]:
        async with calling(app, token({"chat/*": sorted(grant)})) as http:
            assert (await http.request(method, path, json=body)).status_code == status
    async with calling(app, token({"chat/*/*": sorted(OPERATIONS), "chat": sorted(OPERATIONS)})) as http:
        assert (await http.request(method, path, json=body)).status_code == 403


async def test_lists_need_the_right_to_manage_every_name(nowhere: AsyncClient) -> None:
    app = create_app(nowhere, auth=TokenAuth(keys=KEYS))
    for channels, status in [
        ({"**": ["manage"]}, 503), ({"*": ["manage"]}, 403), ({"**": ["read"]}, 403), ({"a/**": ["manage"]}, 403),
    ]:  # fmt: skip
        async with calling(app, token(channels)) as http:
            assert (await http.get("/runs")).status_code == status


async def test_an_id_that_the_server_chooses_needs_a_pattern_for_it(nowhere: AsyncClient) -> None:
    app = create_app(nowhere, auth=TokenAuth(keys=KEYS))
    for pattern, status in [("*", 503), ("**", 503), ("runs/*", 403)]:
        async with calling(app, token({pattern: ["start"]})) as http:
            assert (await http.post("/runs", json={"workflow": "work"})).status_code == status


async def test_a_token_names_the_workflows_that_it_may_start(nowhere: AsyncClient) -> None:
    app = create_app(nowhere, auth=TokenAuth(keys=KEYS))
    granted = {"channels": {"**": ["start"]}}
    for claims, status in [
        (granted | {"workflows": ["work"]}, 503), (granted | {"workflows": ["other"]}, 403), (granted, 403),
    ]:  # fmt: skip
        async with calling(app, token(pgchan=claims)) as http:
            assert (await http.post("/runs", json={"workflow": "work"})).status_code == status


async def test_forbidden_and_unknown_are_the_same_to_a_byte(dsn: str) -> None:
    async with AsyncClient(dsn) as client:
        await client.channel("secret/1").publish(1)
        await client.start("work", id="secret/2")
        async with calling(create_app(client, auth=TokenAuth(keys=KEYS)), token({"mine/*": ["read"]})) as http:
            answers = {
                (response.status_code, response.content)
                for path in ("secret/1", "secret/2", "nothing")
                for response in [
                    await http.get(f"/channels/{path}"),
                    await http.post(f"/channels/{path}", json={"body": 1}),
                    await http.get(f"/channels/{path}", headers={"Accept": "text/event-stream"}),
                    await http.get(f"/runs/{path}"),
                    await http.post(f"/runs/{path}/cancel"),
                ]
            }
    ((status, body),) = answers
    assert (status, json.loads(body)["code"]) == (403, "forbidden")


# ---- patterns

def test_a_pattern_is_no_regular_expression() -> None:
    assert not compile_pattern("a.b").fullmatch("axb")
    assert not compile_pattern("chat/*").fullmatch("chat/a:b")
    assert not compile_pattern("a").fullmatch("a\n")
    assert compile_pattern("**").fullmatch("any/thing:at/all")


# ---- hooks


async def test_one_function_can_decide(nowhere: AsyncClient) -> None:
    asked: list[tuple[str, str, str]] = []

    async def authorize(request: Request, operation: str, channel: str) -> bool:
        asked.append((request.headers["x-user"], operation, channel))
        return channel == "mine"

    async with calling(create_app(nowhere, auth=authorize)) as http:
        headers = {"X-User": "ann"}
        assert (await http.get("/channels/mine", headers=headers)).status_code == 503
        assert (await http.post("/runs/yours/cancel", headers=headers)).status_code == 403
        assert (await http.get("/runs", headers=headers)).status_code == 403
    assert asked == [("ann", "read", "mine"), ("ann", "cancel", "yours"), ("ann", "manage", "**")]


async def test_an_exception_in_a_hook_denies(nowhere: AsyncClient) -> None:
    async def fail(request: Request, operation: str, channel: str) -> bool:
        raise RuntimeError("the user table is away")

    class Failing(Insecure):
        async def authenticate(self, request: Request) -> Any:
            raise RuntimeError("the user table is away")

    assert await statuses(create_app(nowhere, auth=fail), None) == {403}
    assert await statuses(create_app(nowhere, auth=Failing()), None) == {401}


@pytest.mark.parametrize("auth", [7, "insecure", Insecure, object()])
def test_what_cannot_decide_is_refused(nowhere: AsyncClient, auth: Any) -> None:
    with pytest.raises(InvalidInput, match="auth must have"):
        create_app(nowhere, auth=auth)


# ---- how long


async def test_a_stream_ends_with_the_token_that_opened_it(dsn: str) -> None:
    async with AsyncClient(dsn) as client:
        auth = TokenAuth(keys=KEYS, leeway=0.0)
        async with Running(create_app(client, auth=auth)) as served:
            bearer = token({"c": ["read"]}, exp=int(time.time()) + 2)
            async with follow(served.port, "/channels/c", Authorization=f"Bearer {bearer}") as reader:
                assert (await reader.next()).keys() == {"retry", "id"}
                assert await asyncio.wait_for(reader.next(), 5) == {"event": "auth_expired", "data": "{}"}
                with pytest.raises(StopAsyncIteration):
                    await reader.next()
                assert reader.is_complete
            async with follow(served.port, "/channels/c", Authorization=f"Bearer {bearer}") as reader:
                assert reader.status == 401
