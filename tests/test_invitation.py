from __future__ import annotations

import pytest

from forge.errors import ConfigError
from forge.invitation import PREFIX, Invitation, proof_message

INVITATION = Invitation(addresses=("192.0.2.1:7433", "[2001:db8::1]:7433"), fingerprint=bytes(range(32)), secret=b"s" * 32)


def test_an_invitation_comes_back_from_its_string() -> None:
    text = INVITATION.encode()
    assert text.startswith(PREFIX) and text.replace("_", "").replace("-", "").isalnum()
    assert Invitation.parse(f"  {text}\n") == INVITATION
    assert "sss" not in repr(INVITATION)


@pytest.mark.parametrize("damage", [
    lambda text: text[:-1], lambda text: text[1:], lambda text: text[:40] + "A" + text[41:], lambda text: PREFIX,
    lambda text: text + "%", lambda text: text * 20, lambda text: "", lambda text: PREFIX + "\u00e9" * 40,
])  # fmt: skip
def test_a_damaged_string_is_refused_and_not_repeated(damage: object) -> None:
    text = damage(INVITATION.encode())  # type: ignore[operator]
    with pytest.raises(ConfigError, match="copy the whole string") as caught:
        Invitation.parse(text)
    assert not text or text[8:60] == "" or text[8:60] not in str(caught.value)


@pytest.mark.parametrize("address", ["", "here", "here:", "a b:1", "http://here:1", "::1:5", "here:123456", "[here]:1"])
def test_what_is_no_address_is_in_no_invitation(address: str) -> None:
    with pytest.raises(ConfigError):
        Invitation.parse(Invitation(addresses=[address], fingerprint=bytes(32), secret=bytes(32)).encode())


def test_a_proof_is_for_one_coordinator() -> None:
    assert len({proof_message(b""), proof_message(b"a" * 32), proof_message(b"b" * 32)}) == 3
