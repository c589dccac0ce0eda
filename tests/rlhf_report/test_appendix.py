"""The appendix shows what is committed."""

from rlhf_report import appendix


def test_what_the_tests_measured_is_shown_and_within_its_limits():
    rows = appendix.tested_invariants_table()
    assert len(rows) > 10
    assert (rows["measured"].astype(float) <= rows["at most"].astype(float)).all()
