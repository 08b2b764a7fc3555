"""The upgrade has a lab of its own: it makes hosts anew, and begins with what a fresh lab has."""

from tests.lab.conftest import lab as lab
