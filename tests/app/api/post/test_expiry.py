"""When an upload expires, in both of the forms that clients write."""

import pytest

from app.api.errors import InvalidFieldsError
from app.api.post.expiry import MAX_SECONDS, take_expiry

OTHER = ("purpose", "vision")


@pytest.mark.parametrize(
    "said",
    [
        [("expires_after", "60")],
        [("expires_after", '{"seconds": 60}')],
        [("expires_after", '{"anchor": "created_at", "seconds": 60}')],
        [("expires_after[anchor]", "created_at"), ("expires_after[seconds]", "60")],
    ],
)
def test_seconds_count_from_the_creation(said: list[tuple[str, str]]) -> None:
    assert take_expiry([*said, OTHER], 1000.0) == (1060.0, [OTHER])


def test_who_says_nothing_keeps_the_video() -> None:
    assert take_expiry([OTHER], 1000.0) == (None, [OTHER])


@pytest.mark.parametrize("text", ["1", str(MAX_SECONDS)])
def test_the_shortest_and_the_longest(text: str) -> None:
    assert take_expiry([("expires_after", text)], 0.0)[0] == float(text)


@pytest.mark.parametrize(
    "said",
    [
        [("expires_after", text)]
        for text in (
            *("0", "-1", "1.5", "true", "soon", "null", "[60]", "", str(MAX_SECONDS + 1)),
            '{"anchor": "last_used_at", "seconds": 60}',
            '{"seconds": 60, "minutes": 1}',
            "9" * 400,
        )
    ]
    + [[("expires_after[anchor]", "created_at")], [("expires_after[seconds]", "\u0661")]],
    ids=str,
)
def test_anything_else_is_refused_by_its_name(said: list[tuple[str, str]]) -> None:
    with pytest.raises(InvalidFieldsError, match="expires_after: must be seconds") as refused:
        take_expiry(said, 1000.0)
    assert [problem.field for problem in refused.value.problems] == ["expires_after"]
