"""How much a stranger opens to follow one request."""

from tests.docs.request_path import follow

# Which of two threads comes first makes one or two more on some runs. A change that goes over
# argues for its files and classes in its commit.
MAX_FILES, MAX_CLASSES = 124, 196


def test_a_request_runs_through_no_more_than_the_budget() -> None:
    path = follow()
    assert {"app/api/routes/chat.py", "app/worker/publisher.py"} <= path.files  # it did follow
    assert len(path.files) <= MAX_FILES
    assert len(path.classes) <= MAX_CLASSES
