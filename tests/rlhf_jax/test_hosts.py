"""How processes that train together find each other."""

import pytest

from experiment_runs import hosts
from experiment_runs.errors import UserError


@pytest.mark.parametrize("asked", ["here", "localhost:1/2", "localhost:1/2/2", "localhost/2/0"])
def test_hosts_that_cannot_be_read_are_told(monkeypatch, asked):
    monkeypatch.setenv("RLHF_HOSTS", asked)
    with pytest.raises(UserError, match=f"RLHF_HOSTS={asked}: write auto, or ADDRESS:PORT/COUNT"):
        hosts.join()


def test_one_process_is_the_first_and_waits_for_nobody(tmp_path):
    assert hosts.first() and not hosts.several() and hosts.any_of(True) and not hosts.any_of(False)
    hosts.meet("nobody")
    with hosts.own_copy(tmp_path) as own:
        assert own == tmp_path
