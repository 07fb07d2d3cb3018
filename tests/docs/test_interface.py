"""What the documents say of requests, policies and keys is what the code takes."""

import argparse
import re
from dataclasses import asdict

import pytest

from app.api.openai.fields import REFUSED, WITHOUT_EFFECT, CompletionFields, StreamOptionFields
from app.api.openai.messages import SAMPLING_FIELDS
from app.api.rate_limits import rate_limit_headers
from app.api.schemas import ChatFields
from app.keys import command as keys_command
from app.keys.entries import DEFAULT_SCOPES, Scope
from app.keys.limits import KeyLimits
from app.settings import ENV_PREFIX, Settings
from app.store.owner_limits import parse_limit_states
from dycoke_core.auto import AUTO_PARAMETERS
from dycoke_core.compression.policies import make_policy
from dycoke_core.config import POLICY_PARAMETERS, CompressionConfig
from tests.docs.documents import ROOT, blocks
from tests.docs.tables import assert_defaults, choices, codes, defaults, table, words

VIDEO = "video"  # a part of the form, not a field of its
FIELDS = table("docs/api.md", "field", "default")


def test_request_fields_and_their_defaults() -> None:
    said = {n: d for names, default, _ in FIELDS.rows for n, d in defaults(codes(names), default)}
    assert said.keys() == {VIDEO, *ChatFields.model_fields}
    derived = {
        "compression": Settings.model_fields["default_compression"].default,
        "deadline_s": f"{ENV_PREFIX}JOB_TIMEOUT_S",
    }
    said.pop(VIDEO)
    assert_defaults(ChatFields.model_fields, said, derived)


def test_request_fields_name_all_their_choices() -> None:
    for names, *cells in FIELDS.rows:
        named = {word for cell in cells for word in codes(cell)}
        for name in set(codes(names)) - {VIDEO}:
            assert set(choices(ChatFields.model_fields[name])) <= named, name


POLICIES = {
    codes(policy)[0]: cells
    for policy, *cells in table("docs/compression.md", "`policy`", "parameters (defaults)").rows
}


def parameters_of(policy: str) -> dict[str, str]:
    """Each with the default that the row gives it, or none."""
    cell = POLICIES[policy][0]
    inherited: dict[str, str] = {}
    if like := re.match(r"as `(\w+)`(?:, and )?", cell):
        inherited = dict.fromkeys(parameters_of(like[1]), "")
        cell = cell[like.end() :]
    return inherited | dict(re.findall(r"`(\w+)`(?: ([\w.]+))?", cell))


@pytest.mark.parametrize("policy", POLICY_PARAMETERS)
def test_policies_with_their_parameters_and_defaults(policy: str) -> None:
    said = parameters_of(policy)
    assert said.keys() == set(POLICY_PARAMETERS[policy])
    config = asdict(CompressionConfig())
    assert {n: v for n, v in said.items() if v} == {n: str(config[n]) for n, v in said.items() if v}
    has_stage_two = "p" in POLICY_PARAMETERS[policy]
    assert (POLICIES[policy][2] == "off") is not has_stage_two


def test_every_policy_is_there_and_every_parameter_has_its_default_once() -> None:
    assert POLICIES.keys() == POLICY_PARAMETERS.keys()
    told = {n for policy in POLICIES for n, v in parameters_of(policy).items() if v}
    assert told == {name for names in POLICY_PARAMETERS.values() for name in names}
    (example,) = re.findall(r'`\{"policy": "auto", (.*?)\}`', words("docs/compression.md"))
    assert tuple(re.findall(r'"(\w+)":', example)) == AUTO_PARAMETERS


@pytest.mark.parametrize("document", ["README.md", "docs/compression.md"])
def test_the_share_of_tokens_after_stage_one(document: str) -> None:
    config = CompressionConfig()
    left = make_policy(config).count_visual_tokens(32, 196) / (32 * 196)
    said = words(document)
    assert f"At `k` = {config.k} the language model sees {left:.0%}".replace("%", " %") in said


def key_options(action: str) -> set[str]:
    parser = argparse.ArgumentParser()
    keys_command.add_parser(parser.add_subparsers())
    for name in ("keys", action):
        (commands,) = (a for a in parser._actions if isinstance(a.choices, dict))
        parser = commands.choices[name]
    return {option for a in parser._actions for option in a.option_strings} - {"-h", "--help"}


def test_limits_of_keys_have_an_option_and_a_setting() -> None:
    rows = table("docs/keys.md", "`keys add`, `keys limit`", "setting").rows
    assert {codes(option)[0] for option, *_ in rows} == key_options("limit")
    assert key_options("add") == key_options("limit") | {"--scopes"}
    for option, setting, _ in rows:
        name = codes(option)[0].removeprefix("--").replace("-", "_")
        field = f"key_{name}"
        assert name in KeyLimits.model_fields
        if field not in Settings.model_fields:
            assert not codes(setting)
            continue
        default = Settings.model_fields[field].default
        said = [f"{ENV_PREFIX}{field.upper()}"] + ([] if default is None else [str(default)])
        assert codes(setting) == said


def test_scopes_of_keys() -> None:
    said = [codes(scope)[0] for scope, _ in table("docs/keys.md", "scope").rows]
    assert said == [str(scope) for scope in Scope]
    may = " and ".join(str(scope) for scope in Scope if scope in DEFAULT_SCOPES)
    assert f"Such a key may {may}" in words("docs/keys.md")


def test_rate_limit_headers_are_as_shown() -> None:
    (shown,) = (
        block.text for block in blocks(ROOT / "docs" / "keys.md") if "RateLimit" in block.text
    )
    limits = KeyLimits(max_jobs=4, tokens_per_minute=60_000)
    states = parse_limit_states(limits, [(3, -1), (0, -1), (51_200, -1), (0, -1)])
    sent = rate_limit_headers(states)
    assert shown == "".join(f"{name}: {value}\n" for name, value in sent.items())


def test_fields_of_openai_that_are_honoured() -> None:
    rows = table("docs/openai.md", "fields").rows
    honoured = [row for row in rows if not row[1].startswith(("no effect", "refused"))]
    codes_said = [code for row in honoured for cell in row for code in codes(cell)]
    pieces = {piece for code in codes_said for piece in code.split(".")}
    known = CompletionFields.model_fields.keys() | StreamOptionFields.model_fields.keys()
    in_media = {"video_url", "video"}  # where options of the sampling stand
    assert pieces == {*known, *SAMPLING_FIELDS, *in_media, "n"}
    assert REFUSED["n"].is_harmless(1, {}) and not REFUSED["n"].is_harmless(2, {})
    temperature = ChatFields.model_fields["temperature"].default
    assert f"`temperature` (default {temperature:g})" in honoured[0][0]


def test_fields_of_openai_that_have_no_effect() -> None:
    (names,) = (row[0] for row in table("docs/openai.md", "fields").rows if row[1] == "no effect")
    assert codes(names) == list(WITHOUT_EFFECT)
    penalties = {name for name in REFUSED if name.endswith("_penalty")}
    assert penalties and all(REFUSED[name].is_harmless(0, {}) for name in penalties)
