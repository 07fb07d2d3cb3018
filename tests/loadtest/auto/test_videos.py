"""Scenes as files, and who judges the answers."""

from dycoke_core.tiny.questions import DESCRIBE
from loadtest.auto.videos import is_right, make_videos


def test_same_arguments_give_the_same_scenes_and_each_allows_questions() -> None:
    first, again = make_videos(2), make_videos(2)
    assert [video.questions for video in first] == [video.questions for video in again]
    assert first[0].questions != first[1].questions and all(video.questions for video in first)
    assert all(video.clip[4:8] == b"ftyp" for video in first)


def test_answer_is_right_if_all_of_it_is() -> None:
    (video,) = make_videos(1)
    for question in video.questions:
        assert is_right(question, question.answer)
        assert not is_right(question, "")
    description = video.questions[-1]
    assert description.family == DESCRIBE
    assert not is_right(description, description.answer.rpartition(". ")[0] + ".")
