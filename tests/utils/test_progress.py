"""What a user reads while something takes long."""

import pytest

from fit3d_ns.utils.progress import notice, notice_once, track

PATH = "/data/[bold]scan[/bold] [red]2[/]/[0].jpg"


def test_notice__prints_paths_with_square_brackets_whole(capsys: pytest.CaptureFixture[str]) -> None:
    notice(f"Reading {PATH}.")
    assert list(track([1, 2], f"Reading {PATH}")) == [1, 2]
    assert capsys.readouterr().err.count(PATH) >= 2


def test_notice_once__speaks_of_a_subject_once(capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(3):
        notice_once("a subject of this test", f"said {index}")
    assert capsys.readouterr().err == "said 0\n"
