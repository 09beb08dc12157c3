"""Access control of a studio: this machine's browser and its own pages, or holders of a token where it is shared.

A page of another site can make a browser call any address, `http://127.0.0.1` too, and can give its own name that
address (DNS rebinding). So a request must name a host that is this machine, must not come from a page of another
origin, and where other machines may connect it must bring the token.
"""

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
COOKIE = "lexel-studio"
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Refuses requests from elsewhere before the application sees them.

    Args:
        app: the application.
        hosts: names that the Host header may have; None allows any, which needs a token.
        token: what a browser must have brought once; None where only this machine can connect.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None = LOOPBACK, token: str | None = None) -> None:
        if hosts is None and token is None:
            raise ValueError("a studio for any host needs a token")
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no other protocol is spoken

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await (self.refusal(scope) or self.app)(scope, receive, with_headers)

    def refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that must not go on; None where it may."""
        request = HTTPConnection(scope)
        headers = request.headers
        host = headers.get("host", "")
        if self.hosts is not None and name_of(host) not in self.hosts:
            return _refused("this studio answers to its own address only, such as http://127.0.0.1")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return _refused("a page of another site asked; open the studio itself")
        elsewhere = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if elsewhere and not (scope["method"] == "GET" and scope["path"] == "/"):
            return _refused("a page of another site asked; open the studio itself")
        if self.token is None:
            return None
        if self._is_token(request.query_params.get("token", "")):
            answer = RedirectResponse(scope["path"], status_code=303)
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
            return answer
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_token(request.cookies.get(COOKIE, "")) or self._is_token(bearer):
            return None
        return _refused("this studio needs the token of the address that `lexel studio` printed", 401)

    def _is_token(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())


def name_of(host: str) -> str:
    """The name in a Host header, without its port: "localhost", "::1"."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _refused(reason: str, status: int = 403) -> Response:
    return JSONResponse({"error": reason}, status_code=status)
