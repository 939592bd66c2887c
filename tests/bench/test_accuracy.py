"""The divergence between answers, against the formula and in pieces."""

from __future__ import annotations

import numpy as np

from headrace.bench.accuracy import divergence
from headrace.bench.accuracy_texts import TEXTS


def test_the_divergence_is_that_of_the_formula() -> None:
    """Two tokens, p = (3/4, 1/4), q = (1/2, 1/2), whatever is added to the logits."""
    p, q = np.log([[0.75, 0.25]]) + 5, np.log([[0.5, 0.5]]) - 100
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    np.testing.assert_allclose(divergence(p, q), [expected], rtol=1e-12)
    assert np.abs(divergence(p, p)).max() < 1e-15


def test_a_long_text_diverges_as_its_positions_do() -> None:
    random = np.random.default_rng(1)
    p, q = random.standard_normal((2, 150, 9))
    alone = [divergence(p[i : i + 1], q[i : i + 1])[0] for i in range(150)]
    np.testing.assert_array_equal(divergence(p, q), alone)


def test_the_texts_are_those_that_were_recorded() -> None:
    lengths = {name: len(text) for name, text in TEXTS.items()}
    assert lengths == {
        "prose": 1450,
        "code": 1802,
        "digits and languages": 915,
    }
