"""The invitation on the page, as a line and as a QR code, for the operator alone.

The page itself has no password and an invitation is a secret. So a browser gets it only with a key that is new at every start
and that the coordinator prints on its terminal as the fragment of the page's address: no browser sends a fragment to a server
or to another site. Over a network the page is not encrypted, so it has no invitation there at all.
"""

from __future__ import annotations

import hmac
import secrets

import segno
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

INVITATION_PATH = "/invitation"


class Card:
    """One invitation and the key that shows it.

    Args:
        line: what to type on the machine that joins.
    """

    def __init__(self, line: str) -> None:
        self._line = line
        self.key = secrets.token_urlsafe(16)

    async def answer(self, request: Request) -> Response:
        """`line` and `svg` to who sends `Authorization: Bearer KEY`; 403 to everybody else."""
        sent = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(sent, f"Bearer {self.key}".encode()):
            return PlainTextResponse("The address that the coordinator printed when it started shows the invitation.\n", 403)
        code = segno.make_qr(self._line, error="l")
        return JSONResponse({"line": self._line, "svg": code.svg_inline(omitsize=True, light="white")})
