"""The program that runs on hosts. It is one file, and is sent with every bundle."""

from pathlib import Path

SOURCE = (Path(__file__).parent / "agent.py").read_text()
"""The agent's text, as it goes to hosts."""
