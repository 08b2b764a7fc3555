"""Keys that are written into a stack file leave the rest as its operator wrote it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from ops.stackfile import has_private_keys, set_public_keys, write_atomically

FILE = """# Ours.
config:
  posthorn:dkim:
    selector: "a"   # since spring
  posthorn:keys:
    private:
      secure: v1:abc
"""


@pytest.fixture
def stack_file(tmp_path: Path) -> Path:
    file = tmp_path / "Pulumi.x.yaml"
    file.write_text(FILE)
    return file


def test_comments_and_secrets_stay(stack_file: Path) -> None:
    set_public_keys(stack_file, {"authority": "-----BEGIN\nabc\n"})
    text = stack_file.read_text()
    assert text.startswith('# Ours.\nconfig:\n  posthorn:dkim:\n    selector: "a"   # since spring\n')
    assert "secure: v1:abc" in text
    assert "authority: |\n" in text
    assert has_private_keys(stack_file)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f"
    write_atomically(file, "old", 0o600)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_stack_file_stays_as_private_as_it_was_and_where_it_was(stack_file: Path) -> None:
    stack_file.chmod(0o600)
    link = stack_file.with_name("Pulumi.y.yaml")
    link.symlink_to(stack_file.name)
    set_public_keys(link, {"authority": "abc"})
    assert link.is_symlink()
    assert "authority: abc" in stack_file.read_text()
    assert stat.S_IMODE(stack_file.stat().st_mode) == 0o600
