"""The first join of a node that was told nothing: the coordinators on this network, and the invitation that says which."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
import sys

import click

from forge.errors import AccessError, NetworkError
from forge.invitation import Invitation
from forge.lan import Announcement, find, shown
from node.link import NOT_INVITED


def meet() -> Invitation:
    """Show who is on this network and ask for an invitation; it comes back with the addresses that were found.

    Raises:
        AccessError: there is nobody to ask for an invitation, none was found, or the invitation is of nobody found here.
        ConfigError: what was typed is no invitation.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        click.echo("Looking for a coordinator on this network ...")
    try:
        found = find()
    except NetworkError as error:
        raise AccessError(f"{NOT_INVITED} None could be looked for on this network: {_clause(error)}.") from error
    if not found:
        raise AccessError(f"{NOT_INVITED} No coordinator announces itself on this network.")
    if not terminal:
        raise AccessError(f"{NOT_INVITED} On this network there {'is' if len(found) == 1 else 'are'} "
                          f"{', '.join(map(str, found))}.")  # fmt: skip
    for announcement in found:
        click.echo(f"Found {announcement}.")
    which = "its operator" if len(found) == 1 else "the operator of the one that you mean"
    return among(found, Invitation.parse(click.prompt(f"Invitation from {which} (not shown)", hide_input=True)))


def among(found: Sequence[Announcement], invitation: Invitation) -> Invitation:
    """An invitation with the addresses at which its coordinator was found, those first.

    Raises:
        AccessError: nobody who was found says that it is the coordinator of the invitation.
    """
    if not (addresses := _addresses(found, {invitation.fingerprint})):
        raise AccessError(f"The invitation is of another coordinator (its CA is {shown(invitation.fingerprint)}) than "
                          f"{' and '.join(map(str, found))}: compare with what its operator sees, or run `forge-node join "
                          "INVITATION` to go where the invitation says.")  # fmt: skip
    return replace(invitation, addresses=tuple(dict.fromkeys((*addresses, *invitation.addresses))))


def look(trusted: Collection[bytes]) -> list[str]:
    """Where on this network coordinators with these fingerprints say that they are; none when it cannot be looked."""
    with suppress(NetworkError):
        return _addresses(find(lambda announcement: announcement.fingerprint in trusted), trusted)
    return []


def _addresses(found: Sequence[Announcement], trusted: Collection[bytes]) -> list[str]:
    return [address for announcement in found if announcement.fingerprint in trusted for address in announcement.addresses]


def _clause(error: NetworkError) -> str:
    text = str(error).rstrip(".")
    return text[0].lower() + text[1:]
