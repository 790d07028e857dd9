"""Who may do what.

An `auth` object answers two questions: who sent this request (`authenticate`), and may they do this to that channel
(`authorize`). Nothing is allowed by default, and an exception in either denies. A run's id is a channel name, so the
same patterns cover both.

Operations: read (page, long poll, stream; status and result of the run of that name) · publish · signal · cancel ·
start (a run of that id) · manage (delete, resume, journal). Lists are `manage` on "**", which is every name.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.algorithms import HMACAlgorithm
from starlette.requests import Request

from pgchan.errors import InvalidInput

OPERATIONS = frozenset({"read", "publish", "signal", "cancel", "start", "manage"})
EVERY_NAME = "**"

TOKEN_BYTES_MAX = 8 << 10
TOKEN_PATTERNS_MAX = 64
TOKEN_SECONDS_MAX = 3600.0  # how far ahead `exp` may lie; tokens are fetched anew, not kept
LEEWAY_SECONDS = 30.0  # for clocks that differ
SECRET_BYTES_MIN = 32  # RFC 7518, 3.2: an HS256 key is at least as long as the hash

Key: TypeAlias = str | bytes | Ed25519PublicKey | EllipticCurvePublicKey
Hook: TypeAlias = Callable[[Request, str, str], Awaitable[bool]]

logger = logging.getLogger("pgchan.server")


class ChannelAuth(Protocol):
    """What `create_app(auth=…)` takes, besides one function `async authorize(request, operation, channel) -> bool`.

    A principal may have `expires_at` (seconds since 1970, None for never): its streams end then. It may have
    `workflows`, the names of the workflows that it may start.
    """

    async def authenticate(self, request: Request) -> Any:
        """Who sent this request; None if that is not known."""

    async def authorize(self, principal: Any, operation: str, channel: str) -> bool:
        """Whether the principal may do this to the channel, or the run, of that name."""


class Insecure:
    """Everybody may do everything. For tests and for a demo on this machine."""

    async def authenticate(self, request: Request) -> Any:
        """Everybody is the same."""
        return "anonymous"

    async def authorize(self, principal: Any, operation: str, channel: str) -> bool:
        """Yes."""
        return True


class Denied:
    """Nobody may do anything: what holds while nobody has said otherwise."""

    async def authenticate(self, request: Request) -> Any:
        """Nobody is known."""
        return None

    async def authorize(self, principal: Any, operation: str, channel: str) -> bool:
        """No."""
        return False


class _Asked:
    """One function that is asked each time; the request is the principal."""

    def __init__(self, hook: Hook) -> None:
        self.hook = hook

    async def authenticate(self, request: Request) -> Any:
        return request

    async def authorize(self, principal: Any, operation: str, channel: str) -> bool:
        answer: Any = self.hook(principal, operation, channel)
        return bool(await answer if inspect.isawaitable(answer) else answer)


def as_auth(auth: ChannelAuth | Hook | None) -> ChannelAuth:
    """The form that the endpoint uses of what the user gave."""
    if auth is None:
        return Denied()
    if not isinstance(auth, type):  # a class that nobody called
        if callable(getattr(auth, "authenticate", None)) and callable(getattr(auth, "authorize", None)):
            return auth  # type: ignore[return-value]
        if callable(auth):
            return _Asked(auth)
    raise InvalidInput("auth must have authenticate and authorize, or be one function (request, operation, channel)")


async def authenticate(auth: ChannelAuth, request: Request) -> Any:
    """Who sent the request; None if unknown or if the question failed."""
    try:
        return await auth.authenticate(request)
    except Exception:
        logger.exception("authenticate failed; the request is denied")
        return None


async def is_allowed(auth: ChannelAuth, principal: Any, operation: str, channel: str) -> bool:
    """Whether the principal may; no if the question failed."""
    try:
        return bool(await auth.authorize(principal, operation, channel))
    except Exception:
        logger.exception("authorize failed; the request is denied")
        return False


# ------------------------------------------------------------------------------------------------ tokens


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a token was issued to. rights: operations by pattern. expires_at: seconds since 1970."""

    subject: str
    expires_at: float
    workflows: frozenset[str]
    rights: tuple[tuple[re.Pattern[str], frozenset[str]], ...]


class TokenAuth:
    """JSON Web Tokens that say which channels their holder may use, and how.

    The token travels as `Authorization: Bearer …` and has the claims `sub`, `aud`, `exp` and
    `pgchan: {"channels": {pattern: [operation, …]}, "workflows": [name, …]}`. A pattern is a name in which a segment
    between `/` or `:` may be `*`, for any one segment, and the last one `**`, for all that follows.

    keys: one key or several, or keys by `kid`: a public Ed25519 or P-256 key (an object, or PEM) verifies EdDSA or
    ES256, a secret of at least 32 bytes HS256. The key decides on the algorithm, never the token. audience: what `aud`
    must name. seconds_max: how far ahead `exp` may lie. Raises InvalidInput.
    """

    def __init__(
        self, keys: Key | Sequence[Key] | Mapping[str, Key], *, audience: str = "pgchan",
        seconds_max: float = TOKEN_SECONDS_MAX, leeway: float = LEEWAY_SECONDS,
    ) -> None:  # fmt: skip
        self._by_kid: dict[str, _Verifier] = {}
        self._unnamed: list[_Verifier] = []
        if isinstance(keys, Mapping):
            self._by_kid = {kid: _verifier(key) for kid, key in keys.items()}
        elif isinstance(keys, Sequence) and not isinstance(keys, str | bytes):
            self._unnamed = [_verifier(key) for key in keys]
        else:
            self._unnamed = [_verifier(keys)]
        if not self._by_kid and not self._unnamed:
            raise InvalidInput("keys must hold at least one key")
        self._audience = audience
        self._seconds_max = seconds_max
        self._leeway = leeway

    async def authenticate(self, request: Request) -> Any:
        """The principal of a valid token in the Authorization header; None for anything else."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token or len(token) > TOKEN_BYTES_MAX:
            return None
        return self.verify(token.strip())

    async def authorize(self, principal: Any, operation: str, channel: str) -> bool:
        """Whether one pattern of the token covers both the name and the operation."""
        return any(operation in operations and name.fullmatch(channel) for name, operations in principal.rights)

    def verify(self, token: str) -> Principal | None:
        """Who a token was issued to; None if it is not valid, now, here, in each of its parts."""
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError:
            return None
        for verifier in self._candidates(header):
            try:
                claims = jwt.decode(
                    token, verifier.key, algorithms=[verifier.algorithm], audience=self._audience, leeway=self._leeway,
                    options={"require": ["sub", "aud", "exp", "pgchan"]},
                )  # fmt: skip
                return self._principal(claims)
            except (jwt.InvalidTokenError, InvalidInput, ArithmeticError, ValueError, TypeError):
                continue
        return None

    def _candidates(self, header: Mapping[str, Any]) -> list[_Verifier]:
        """The keys that may have signed it: the one that `kid` names, or all where it names none."""
        if "crit" in header:
            return []
        kid = header.get("kid")
        if kid is None:
            return [*self._unnamed, *self._by_kid.values()]
        return [self._by_kid[kid]] if isinstance(kid, str) and kid in self._by_kid else []

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        subject, expires_at, given = claims["sub"], claims["exp"], claims["pgchan"]
        if not isinstance(subject, str) or not subject:
            raise InvalidInput("sub must be a str that is not empty")
        if isinstance(expires_at, bool) or not isinstance(expires_at, int | float) or not math.isfinite(expires_at):
            raise InvalidInput("exp must be a number")
        if expires_at > time.time() + self._seconds_max + self._leeway:
            raise InvalidInput(f"exp must lie at most {self._seconds_max:g} s ahead")
        if not isinstance(given, dict) or not given.keys() <= {"channels", "workflows"} or "channels" not in given:
            raise InvalidInput("pgchan must hold channels, may hold workflows, and nothing else")
        channels, workflows = given["channels"], given.get("workflows", [])
        if not isinstance(channels, dict) or len(channels) > TOKEN_PATTERNS_MAX:
            raise InvalidInput(f"pgchan.channels must be an object with at most {TOKEN_PATTERNS_MAX} patterns")
        rights = tuple((compile_pattern(pattern), _operations(allowed)) for pattern, allowed in channels.items())
        return Principal(subject, expires_at + self._leeway, frozenset(_strings(workflows)), rights)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The expression that matches the names a token's pattern covers, as a whole and by case."""
    parts = re.split(r"([/:])", pattern)
    last = len(parts) - 1
    expression = ""
    for index, part in enumerate(parts):
        if part == "**" and index == last:
            expression += r".+"
        elif part == "*":
            expression += r"[A-Za-z0-9._@~+=-]+"
        elif "*" in part:
            raise InvalidInput("in a pattern * stands for a whole segment, and ** for all that follow the last / or :")
        else:
            expression += re.escape(part)
    return re.compile(expression)


def _operations(allowed: Any) -> frozenset[str]:
    operations = frozenset(_strings(allowed))
    if not operations <= OPERATIONS:
        raise InvalidInput(f"operations must be among {', '.join(sorted(OPERATIONS))}")
    return operations


def _strings(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InvalidInput("must be an array of strings")
    return value


@dataclass(frozen=True, slots=True)
class _Verifier:
    algorithm: str
    key: Any


def _verifier(key: Key) -> _Verifier:
    if isinstance(key, str):
        key = key.encode()
    if isinstance(key, bytes) and key.lstrip().startswith(b"-----BEGIN"):
        try:
            loaded = load_pem_public_key(key)
        except ValueError:
            raise InvalidInput("a PEM key must be the public one of Ed25519 or P-256") from None
        if not isinstance(loaded, Ed25519PublicKey | EllipticCurvePublicKey):
            raise InvalidInput("a PEM key must be the public one of Ed25519 or P-256")
        key = loaded
    if isinstance(key, Ed25519PublicKey):
        return _Verifier("EdDSA", key)
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return _Verifier("ES256", key)
    if not isinstance(key, bytes):
        raise InvalidInput(f"a key must be a secret, or a public key of Ed25519 or P-256, not {type(key).__name__}")
    if len(key) < SECRET_BYTES_MIN:
        raise InvalidInput(f"a secret must have at least {SECRET_BYTES_MIN} bytes, not {len(key)}")
    try:
        # Refuses what is a public key in text form: whoever knows it could sign with it.
        return _Verifier("HS256", HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(key))
    except jwt.InvalidKeyError:
        raise InvalidInput("a secret must be random bytes, not the text of a public key") from None
