"""What rounding makes of steps, where it can be told by hand."""

import numpy as np
import pytest
from rounded_steps import as_here, seen, to_nearest

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
def test_to_nearest_a_step_is_seen_where_it_carries_a_weight_over_the_middle(weight, step, share):
    weights = np.full((300, 300), weight, "float32")
    assert seen(weights, np.float32([step]), to_nearest) == pytest.approx(share, rel=0.01)
    assert seen(weights, np.float32([step]), as_here) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("rounded", [to_nearest, as_here])
def test_of_weights_that_lie_anywhere_every_step_is_seen_in_full_on_average(rounded):
    random = np.random.default_rng(0)
    weights = random.uniform(1, 2, (1000, 1000)).astype("float32")
    sign = random.choice(np.float32([-1, 1]), weights.shape)
    for step in (0.1, 0.5, 3):
        found = seen(weights, np.float32(step * BETWEEN) * sign, rounded)
        assert found == pytest.approx(1, abs=0.02)
