"""What settings may say, what is refused by its name, and the name that a model goes by."""

from pathlib import Path

import pytest

from app.settings import API_SECRETS, ENV_PREFIX, Settings, load_settings


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"{ENV_PREFIX}{name.upper()}", raising=False)


def load(monkeypatch: pytest.MonkeyPatch, **values: str) -> Settings:
    for name, value in values.items():
        monkeypatch.setenv(f"{ENV_PREFIX}{name.upper()}", value)
    return load_settings()


def test_variables_are_read_under_their_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "1")
    settings = load(monkeypatch, port="9000", allow_anonymous="true", lease_s="3")
    assert (settings.port, settings.allow_anonymous, settings.lease_s) == (9000, True, 3.0)
    assert load_settings().max_frames == Settings().max_frames


def test_a_variable_that_names_no_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown settings: DYCOKE_LEASE\b.*DYCOKE_PROT\b"):
        load_settings({"DYCOKE_PROT": "1", "DYCOKE_LEASE": "2", "DYCOKE_PORT": "3", "OTHER": "4"})


def test_hosts_are_lists_of_names_without_scheme_and_port(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, allowed_hosts=" Api.example.com, *.example.org ,, ::1 ,*")
    assert settings.allowed_hosts == ["api.example.com", "*.example.org", "[::1]", "*"]
    for wrong in ("https://api.example.com", "example.com:8000", "a b", ",", "*.*.com/"):
        with pytest.raises(ValueError, match="allowed_hosts"):
            load(monkeypatch, allowed_hosts=wrong)


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("https://app.example.com", ["https://app.example.com"]),
        ("http://localhost:3000,https://[::1]", ["http://localhost:3000", "https://[::1]"]),
        ("app.example.com", None),
        ("https://app.example.com/", None),
        ("*", None),
    ],
)
def test_origins_have_a_scheme_and_no_path(
    text: str, origins: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if origins is None:
        with pytest.raises(ValueError, match="allowed_origins"):
            load(monkeypatch, allowed_origins=text)
    else:
        assert load(monkeypatch, allowed_origins=text).allowed_origins == origins


def test_proxies_are_addresses_or_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, trusted_proxies="10.0.0.1,192.168.0.0/16,fd00::/8")
    assert settings.trusted_proxies == ["10.0.0.1", "192.168.0.0/16", "fd00::/8"]
    for wrong in ("proxy.example.com", "10.0.0.1/8", "300.1.1.1"):
        with pytest.raises(ValueError, match="trusted_proxies"):
            load(monkeypatch, trusted_proxies=wrong)


def test_a_key_that_is_wrong_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "s3cret-" + "x" * 32
    assert load(monkeypatch, api_keys=f"alice:{secret}").api_keys[0].name == "alice"
    with pytest.raises(ValueError) as refused:
        load(monkeypatch, api_keys=f"alice:{secret},{secret}")
    assert secret not in str(refused.value)
    assert "DYCOKE_API_KEYS" in API_SECRETS


def test_what_comes_in_at_a_time_has_room_for_the_largest_upload(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(monkeypatch, max_incoming_bytes="1000", max_upload_bytes="1000")
    with pytest.raises(ValueError, match="DYCOKE_MAX_INCOMING_BYTES"):
        load(monkeypatch, max_incoming_bytes="999")


def test_a_model_is_known_by_its_folder_or_its_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Settings().model_name == "dycoke-tiny"
    assert Settings(model="org/name").model_name == "org/name"
    (tmp_path / "mine").mkdir()
    assert Settings(model=str(tmp_path / "mine")).model_name == "mine"
    monkeypatch.chdir(tmp_path / "mine")
    assert Settings(model=".").model_name == "mine", "whatever the path that leads there"
