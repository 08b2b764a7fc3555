"""The page of all keys."""

from __future__ import annotations

from ops.reference import PATH, page


def test_the_page_of_all_keys_says_what_the_model_reads() -> None:
    assert PATH.read_text() == page(), "a key of the model has changed: run make reference"
