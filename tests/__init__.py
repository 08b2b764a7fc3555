"""Tests. They have a lab of their own, beside whatever lab runs."""

import os

os.environ.setdefault("POSTHORN_LAB", "test")
