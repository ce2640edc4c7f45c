"""What the laptop takes from a head without trusting it."""

import pytest

from cluster.cli import RunError
from cluster.laptop.remote import _plain


@pytest.mark.parametrize("name", ["night", "night-1-0a1b2c3d.log", "v1.2_b", "7"])
def test_the_name_of_a_run_is_taken(name):
    assert _plain(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/x", ".ssh", "-e", "a\nb", "a\0b", "a b"]
)
def test_a_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(RunError, match="nothing was written"):
        _plain(name)
