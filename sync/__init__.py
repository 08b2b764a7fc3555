"""The service that keeps the mailboxes of two hosts alike. It is one file, and is pushed like any other."""

from pathlib import Path

SOURCE = (Path(__file__).parent / "sync.py").read_text()
"""The program's text, as it goes to mailbox hosts."""
