"""Who may talk to the server: hosts and origins. The middleware asks.

A browser sends requests on behalf of any page. Three checks keep out a page that its user did not mean. Bodies must be
JSON, which no page may send to another origin without asking first (the middleware checks that). The origin that the
browser then names must be allowed. The host must be ours, since a page may point its own name at this machine (DNS
rebinding).
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

# A port, or nothing, must follow the name. What a name may consist of is the resolver's business, but for separators.
_HOST = re.compile(r"(?:\[([0-9a-fA-F:.%\w~-]+)\]|([^\s:/?#@\[\]\\,]+))(?::\d{0,5})?")
_LOOPBACK_ORIGIN = r"https?://(?:(?:[a-z0-9-]+\.)*localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d{1,5})?"
_PRIVATE = (".local", ".internal")  # endings that no public name server can hold
EXPOSED_HEADERS = ("x-request-id", "retry-after")


def host_name(value: str) -> str:
    """`Example.COM.:8000` -> `example.com`; an IPv6 address without its brackets. Raises ValueError."""
    match = _HOST.fullmatch(value)
    if match is None:
        raise ValueError(f"{value[:100]!r} is no host")
    if match[1] is not None:
        ipaddress.IPv6Address(match[1])  # a ValueError too
        return match[1].lower()
    name = match[2].lower().removesuffix(".")
    if not name:
        raise ValueError("a host without a name")
    return name


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Hosts:
    """Names under which a request may call this server.

    IP addresses always pass: rebinding needs a name. So do localhost, this machine's names, and `names`, in which
    `*.example.com` stands for all names below it and `*` for every name. `private` adds names that no public DNS can
    hold.
    """

    names: tuple[str, ...] = ()
    private: bool = False
    own: frozenset[str] = field(default_factory=lambda: frozenset((socket.gethostname().lower(),)))

    def allows(self, name: str) -> bool:
        """Whether `name`, as `host_name` gives it, is one of ours."""
        if is_address(name) or name == "localhost" or name.endswith(".localhost") or name in self.own:
            return True
        if self.private and ("." not in name or name.endswith(_PRIVATE)):
            return True
        return any(
            pattern == "*" or name == pattern or (pattern.startswith("*.") and name.endswith(pattern[1:]))
            for pattern in self.names
        )


def hosts_for(bound: str, names: Sequence[str], *, keys: bool) -> Hosts:
    """What a server bound to the address `bound` accepts, with `names` allowed.

    On loopback: little besides loopback's names. On other addresses: the names of a private network too. With keys:
    every name, since a page does not have the key, and a proxy should need no second flag.
    """
    listed = tuple(name.removesuffix(".").lower() for name in names)
    if not is_address(bound):
        listed += (bound.removesuffix(".").lower(),)
    loopback = ipaddress.ip_address(bound).is_loopback if is_address(bound) else bound.lower() == "localhost"
    if not loopback and keys and not names:
        return Hosts(("*",))
    return Hosts(listed, private=not loopback)


@dataclass(frozen=True)
class Cors:
    """What pages of other origins may do. `origins` None: pages that this machine serves to itself (loopback)."""

    origins: tuple[str, ...] | None = None
    methods: tuple[str, ...] = ("*",)
    headers: tuple[str, ...] = ("*",)
    credentials: bool = False

    def middleware(self) -> CORSMiddleware:
        """starlette's, of which our middleware calls the parts."""
        patterns = [_LOOPBACK_ORIGIN] if self.origins is None else [_pattern(o) for o in self.origins if o != "*"]
        return CORSMiddleware(
            _nothing,
            allow_origins=["*"] if self.origins and "*" in self.origins else [],
            allow_origin_regex="|".join(f"(?:{pattern})" for pattern in patterns) or None,
            allow_methods=self.methods,
            allow_headers=self.headers,
            allow_credentials=self.credentials,
            allow_private_network=True,  # the origin must be allowed as well
            expose_headers=EXPOSED_HEADERS,
        )


def _pattern(origin: str) -> str:
    """A regular expression for an origin in which `*` stands for a part of the host, or for any port."""
    return re.escape(origin.lower()).replace(r"\*", r"[^/:]*")


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("our middleware calls the parts of starlette's, never the app inside it")


def is_same_origin(origin: str, host: str) -> bool:
    """Whether a page of `origin` was loaded from the Host that it now calls. The scheme may have changed on the way, at
    a proxy that ends TLS."""
    return origin.partition("://")[2].lower() == host.lower()
