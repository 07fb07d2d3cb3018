"""What a key is, and what `DYCOKE_API_KEYS` may say."""

import pytest

from app.keys.entries import FORM, Principal, Scope, digest_of, new_secret, parse_configured_keys

SECRET = "s3cret-" + "x" * 32


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_set_but_empty_is_an_error_and_not_an_open_door(text: str) -> None:
    with pytest.raises(ValueError, match="name:key"):
        parse_configured_keys(text)


def test_bare_key_is_refused_with_the_form() -> None:
    with pytest.raises(ValueError) as refused:
        parse_configured_keys(f"a:{SECRET}, {SECRET}y")
    assert FORM in str(refused.value) and "key 2" in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("secret", ["a", "x" * 31, "x" * 31 + " y", "zwö" + "x" * 32, ""])
def test_short_or_unprintable_key_is_refused_without_being_shown(secret: str) -> None:
    with pytest.raises(ValueError, match="32 printable ASCII") as refused:
        parse_configured_keys(f"name:{secret}")
    assert len(secret) < 2 or secret not in str(refused.value)


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "x" * 65])
def test_name_that_could_be_mistaken_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="the name of key 1"):
        parse_configured_keys(f"{name}:{SECRET}")


def test_key_is_what_stands_behind_the_first_colon() -> None:
    (key,) = parse_configured_keys(f"a:{SECRET}:and:more")
    assert key.digest == digest_of(f"{SECRET}:and:more")
    assert SECRET not in repr(key)


@pytest.mark.parametrize("text", [f"a:{SECRET},a:{SECRET}y", f"a:{SECRET},b:{SECRET}"])
def test_names_and_keys_are_there_once(text: str) -> None:
    with pytest.raises(ValueError, match="same"):
        parse_configured_keys(text)


def test_configured_key_may_ask_and_upload_and_keeps_its_holder_with_another_secret() -> None:
    (first,) = parse_configured_keys(f"a:{SECRET}")
    (second,) = parse_configured_keys(f"a:{SECRET}y")
    (other,) = parse_configured_keys(f"b:{SECRET}")
    assert first.principal == second.principal
    assert first.principal.owner != other.principal.owner
    assert first.principal.scopes == {Scope.ASK, Scope.UPLOAD}
    assert isinstance(first.principal, Principal) and first.digest not in first.principal.owner


def test_made_secrets_are_keys_that_would_be_taken() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    parse_configured_keys(",".join(f"n{i}:{secret}" for i, secret in enumerate(secrets)))
