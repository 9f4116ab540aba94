"""Who may be here: invitations, the nodes that came with them, and those that were sent away."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
import hashlib
import hmac
from pathlib import Path
import time
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from coordinator.database import Database
from coordinator.records import InvitationRecord, NodeRecord
from coordinator.tables import Admission, Invitation, Node, Revocation
from forge.errors import AccessError, ConfigError, ProtocolError

#: Nodes of one run; far above any fleet, far below what would fill a disk.
MAX_NODES = 10_000

NO_INVITATION = ("This coordinator does not know this node: ask its operator for an invitation (`forge-coordinator token "
                 "create`) and run `forge-node join INVITATION`.")  # fmt: skip
REVOKED = "This node was revoked by the coordinator's operator: ask the operator why."
_ANOTHER = "ask the coordinator's operator for another one (`forge-coordinator token create`)"


class Guests:
    """Invitations and nodes. Every method is one transaction and may be called from any thread.

    Args:
        location: SQLite file, SQLAlchemy URL, or a database that is open.
        clock: seconds since the epoch.
    """

    def __init__(self, location: Path | str | Database, clock: Callable[[], float] = time.time) -> None:
        self._database = location if isinstance(location, Database) else Database(location)
        self._clock = clock

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    # --- invitations ------------------------------------------------------------------------------------------------

    def invite(self, secret: bytes, *, name: str, uses: int, seconds: float) -> InvitationRecord:
        """Remember the hash of a new secret, which lets `uses` nodes in within `seconds`."""
        sha256, now = hashlib.sha256(secret).hexdigest(), self._clock()
        with self._database.transaction() as session:
            invitation = Invitation(id=sha256[:8], sha256=sha256, name=name, uses=uses, used=0, created_at=now,
                                    expires_at=now + seconds, revoked_at=None)  # fmt: skip
            session.add(invitation)
            return self._invitation(invitation)

    def invitations(self) -> list[InvitationRecord]:
        """Every invitation, the oldest first."""
        with self._database.reading() as session:
            rows = session.scalars(select(Invitation).order_by(Invitation.created_at, Invitation.id))
            return [self._invitation(row) for row in rows]

    def revoke_invitation(self, invitation_id: str) -> InvitationRecord:
        """Let nobody else in with an invitation; nodes that came with it stay.

        Raises:
            ConfigError: there is no such invitation.
        """
        with self._database.transaction() as session:
            invitation = session.get(Invitation, invitation_id)
            if invitation is None:
                raise ConfigError(f"There is no invitation {invitation_id[:80]!r}: `forge-coordinator token list` shows "
                                  "them all.")  # fmt: skip
            invitation.revoked_at = invitation.revoked_at or self._clock()
            return self._invitation(invitation)

    # --- nodes ------------------------------------------------------------------------------------------------------

    def check_guest(self, node_id: str, secret: bytes | None) -> str:
        """Whether a node may join: it is known, or has a valid invitation. Changes nothing.

        Returns:
            The id of the node if it is known, else of its invitation.

        Raises:
            AccessError: it may not, and why.
        """
        with self._database.reading() as session:
            if session.get(Node, node_id) is None:
                return self._valid(session, secret).id
            if session.get(Revocation, node_id) is not None:
                raise AccessError(REVOKED)
            return node_id

    def admit(self, node_id: str, public_key: bytes, name: str, machine: dict[str, Any], secret: bytes | None) -> bool:
        """Remember a node that may join; whether it is new, and so has used its invitation once.

        Raises:
            AccessError: it may not join.
            ProtocolError: the run has `MAX_NODES` nodes.
        """
        with self._database.transaction() as session:
            if session.get(Revocation, node_id) is not None:
                raise AccessError(REVOKED)
            if session.get(Node, node_id) is not None:
                return self._remember(session, node_id, public_key, name, machine)
            invitation = self._valid(session, secret)
            # One statement, so that two nodes cannot both take the last use on any database.
            left = update(Invitation).where(Invitation.id == invitation.id, Invitation.used < Invitation.uses)
            taken = session.execute(left.values(used=Invitation.used + 1))
            if not taken.rowcount:  # type: ignore[attr-defined]
                raise AccessError(_used_up(invitation))
            self._remember(session, node_id, public_key, name, machine)
            session.flush()
            session.add(Admission(node_id=node_id, invitation=invitation.id))
            return True

    def register_node(self, node_id: str, public_key: bytes, name: str, machine: dict[str, Any]) -> bool:
        """Remember a node, or what it says about itself now, without asking for an invitation; whether it is new."""
        with self._database.transaction() as session:
            return self._remember(session, node_id, public_key, name, machine)

    def node(self, node_id: str) -> NodeRecord | None:
        """The node of that id, noting that it was heard of just now.

        Raises:
            AccessError: it was revoked.
        """
        with self._database.transaction(durable=False) as session:
            node = session.get(Node, node_id)
            if node is None:
                return None
            if session.get(Revocation, node_id) is not None:
                raise AccessError(REVOKED)
            node.seen_at = self._clock()
            return node_record(node)

    def _remember(self, session: Session, node_id: str, public_key: bytes, name: str, machine: dict[str, Any]) -> bool:
        now = self._clock()
        node = session.get(Node, node_id)
        if node is not None:
            node.name, node.machine, node.seen_at = name, machine, now
            return False
        if (session.scalar(select(func.count()).select_from(Node)) or 0) >= MAX_NODES:
            raise ProtocolError(f"This run has {MAX_NODES} nodes already and takes no more.")
        session.add(Node(id=node_id, public_key=public_key, name=name, machine=machine, joined_at=now, seen_at=now))
        return True

    def _valid(self, session: Session, secret: bytes | None) -> Invitation:
        if not secret:
            raise AccessError(NO_INVITATION)
        sha256 = hashlib.sha256(secret).hexdigest()
        invitation = session.get(Invitation, sha256[:8])
        if invitation is None or not hmac.compare_digest(invitation.sha256, sha256):
            raise AccessError(f"This invitation is not one of this run: {_ANOTHER}.")
        if invitation.revoked_at is not None:
            raise AccessError(f"This invitation was revoked: {_ANOTHER}.")
        if invitation.expires_at <= self._clock():
            when = datetime.fromtimestamp(invitation.expires_at).strftime("%Y-%m-%d %H:%M")
            raise AccessError(f"This invitation expired on {when}: {_ANOTHER}.")
        if invitation.used >= invitation.uses:
            raise AccessError(_used_up(invitation))
        return invitation

    def _invitation(self, row: Invitation) -> InvitationRecord:
        state = ("revoked" if row.revoked_at is not None else "used up" if row.used >= row.uses
                 else "expired" if row.expires_at <= self._clock() else "valid")  # fmt: skip
        return InvitationRecord(id=row.id, name=row.name, uses=row.uses, used=row.used, state=state,
                                expires_at=row.expires_at)  # fmt: skip


def node_record(node: Node, *, accepted: int = 0, rejected: int = 0, invitation: str = "",
                revoked: bool = False) -> NodeRecord:  # fmt: skip
    """A node as a plain value."""
    return NodeRecord(id=node.id, name=node.name, public_key=node.public_key, machine=node.machine, seen_at=node.seen_at,
                      accepted=accepted, rejected=rejected, invitation=invitation, revoked=revoked)  # fmt: skip


def _used_up(invitation: Invitation) -> str:
    times = "once" if invitation.uses == 1 else f"{invitation.uses} times"
    return f"This invitation was good {times} and is used up: {_ANOTHER}."
