"""Machines that the tests of several machines share."""

import pytest

from tests.launch import nodes as machines


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Two machines that see pytest's temporary folder; all else in /tmp is each machine's own."""
    if reason := machines.reason_not_to():
        pytest.skip(reason)
    made = machines.Nodes(tmp_path_factory.mktemp("nodes"), shared=(tmp_path_factory.getbasetemp(),))
    yield made
    made.close()
