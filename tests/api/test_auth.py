"""API keys."""

import pytest
from pydantic import SecretStr

from app.api.auth import ANONYMOUS, ApiKeys
from app.errors import UnauthorizedError


def test_without_keys_everybody_is_anonymous() -> None:
    assert ApiKeys([]).principal(None) == ApiKeys([]).principal("Bearer x") == ANONYMOUS


def test_key_holders_are_told_apart_without_naming_the_key() -> None:
    keys = ApiKeys([SecretStr("one"), SecretStr("zwö")])
    one = keys.principal("Bearer one")
    assert one == keys.principal("bearer  one ")
    two = keys.principal("Bearer " + "zwö".encode().decode("latin-1"))
    assert one != two
    assert "one" not in one


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "one", "Basic one", "Bearer o"])
def test_others_are_refused(header: str | None) -> None:
    with pytest.raises(UnauthorizedError):
        ApiKeys([SecretStr("one")]).principal(header)
