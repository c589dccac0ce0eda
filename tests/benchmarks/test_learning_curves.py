"""What is said of curves that are made up."""

import learning_curves
import numpy as np


def test_a_side_is_compared_seed_by_seed_beside_what_the_seeds_differ_by():
    level = np.asarray([[0.1], [0.3], [0.5]])
    curves = {
        learning_curves.STEADY: level + np.asarray([[-0.1, 0.1]]),
        learning_curves.CHANGED: level + np.asarray([[0.0, 0.1]]),
        learning_curves.CONTROL: level[:1] + 1,
    }
    seeds, steady, changed, control = learning_curves.compared(curves).splitlines()
    assert "within 0.400 of each other" in seeds
    assert steady.endswith("0.100, 0.300, 0.500; mean 0.300")
    assert changed.endswith("less float32: +0.050, +0.050, +0.050; mean +0.050")
    assert control.endswith("less float32: +1.000; mean +1.000")
