"""What rounding makes of steps, where it can be told by hand."""

import numpy as np
import pytest
from rounded_steps import seen

BETWEEN = 2.0**-7  # of two numbers of bfloat16 from 1 to 2


@pytest.mark.parametrize(
    ("weight", "step", "share"),
    [
        (1.0, 0.49 * BETWEEN, 0),  # a number of bfloat16: not far enough
        (1.0, 0.51 * BETWEEN, 1 / 0.51),
        (1 + 0.5 * BETWEEN, 0.01 * BETWEEN, 100),  # the middle between two: all the way
        (0.0, 1e-6, 1.0),
    ],
)
def test_a_step_is_seen_where_it_carries_a_weight_over_the_middle(weight, step, share):
    assert seen(np.float32([weight]), np.float32([step])) == pytest.approx(share, rel=0.01)


def test_of_weights_that_lie_anywhere_every_step_is_seen_in_full_on_average():
    random = np.random.default_rng(0)
    weights = random.uniform(1, 2, 1_000_000).astype("float32")
    sign = random.choice(np.float32([-1, 1]), len(weights))
    for step in (0.1, 0.5, 3):
        assert seen(weights, np.float32(step * BETWEEN) * sign) == pytest.approx(1, abs=0.02)
