"""Tests of what ``make test`` says at its end."""

from __future__ import annotations

from tests.all import Run, perform


def test_what_failed_beside_others_is_said_again_with_its_label_and_its_reason() -> None:
    output = "tests/lab/test_x.py::test_y FAILED [ 50%]\nE   assert 1 == 2\nFAILED tests/lab/test_x.py::test_y - 1 == 2"
    fails = Run(("python", "-c", f"print({output!r}); raise SystemExit(1)"), "12a")
    works = Run(("python", "-c", "print('E   is what this one prints, and all is well')"), "12b")
    why = perform((fails, works))
    assert why[:2] == ["12a │ E   assert 1 == 2", "12a │ FAILED tests/lab/test_x.py::test_y - 1 == 2"]
    assert why[2].startswith("12a ended with status 1: python")
    assert len(why) == 3


def test_nothing_is_said_again_where_all_went_well() -> None:
    assert perform((Run(("python", "-c", "print('FAILED is a word')"), "12a"),) * 2) == []


def test_a_command_that_is_killed_before_it_says_anything_has_failed() -> None:
    killed = Run(("python", "-c", "import os; os.kill(os.getpid(), 9)"), "13a")
    assert perform((killed, killed))[0].startswith("13a ended with status -9")
