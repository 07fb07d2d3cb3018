"""Which names of hosts a pattern allows, and which name this machine."""

import pytest

from app.api.connection.hosts import is_allowed, is_loopback_name


@pytest.mark.parametrize(
    ("host", "is_expected"),
    [
        ("video.example.org", True),
        ("a.example.com", True),
        ("a.b.example.com", True),
        ("example.com", False),  # below it, not itself
        ("badexample.com", False),
        ("video.example.org.evil.net", False),
        ("", False),
    ],
)
def test_names_are_allowed_whole_or_below_a_suffix(host: str, is_expected: bool) -> None:
    assert is_allowed(host, ["video.example.org", "*.example.com"]) is is_expected
    assert is_allowed(host, ["*"])
    assert not is_allowed(host, [])


@pytest.mark.parametrize(
    ("host", "is_expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("[::1]", True),
        ("::1", False),  # no header writes it so
        ("[127.0.0.1]", False),
        ("localhost.evil.net", False),
        ("10.0.0.1", False),
        ("example.com", False),
    ],
)
def test_loopback_by_name_or_address(host: str, is_expected: bool) -> None:
    assert is_loopback_name(host) is is_expected
