import math
from fractions import Fraction

import numpy as np
import pytest

from darkformer_jax.tasks.scores import class_scores, correlations, count_pairs, predict_by_bag_of_bytes


def test_scores_of_two_classes_by_hand():
    true, false_alarms, missed, other = 6, 2, 3, 9
    scores = class_scores(np.array([[other, false_alarms], [missed, true]], float))
    assert scores.accuracy == pytest.approx(15 / 20)
    assert scores.f1 == pytest.approx(2 * true / (2 * true + false_alarms + missed))
    product = (true + false_alarms) * (true + missed) * (other + false_alarms) * (other + missed)
    assert scores.matthews == pytest.approx((true * other - false_alarms * missed) / math.sqrt(product))


def test_f1_of_three_classes_is_the_mean_of_each_classes_own():
    confusion = np.array([[4, 1, 0], [0, 3, 0], [2, 0, 0]], float)
    assert class_scores(confusion).f1 == pytest.approx(np.mean([8 / 11, 6 / 7, 0.0]))


def test_an_answer_that_ignores_the_input_has_no_correlation():
    scores = class_scores(np.array([[0, 5], [0, 15]], float))
    assert (scores.accuracy, scores.matthews) == (0.75, 0.0)
    assert class_scores(np.array([[5, 0], [15, 0]], float)).f1 == 0.0


def test_pairs_are_counted():
    assert count_pairs(np.array([0, 1, 1]), np.array([1, 1, 1]), 2).tolist() == [[0, 1], [0, 2]]


def test_pearson_sees_lines_and_spearman_orders():
    true = np.array([1.0, 2.0, 3.0, 4.0])
    assert correlations(true, 2 * true - 1) == pytest.approx((1.0, 1.0))
    cubes = correlations(true, -(true**3))
    assert cubes.spearman == pytest.approx(-1.0) and -1 < cubes.pearson < -0.9
    assert correlations(true, np.full(4, 2.0)) == (0.0, 0.0)


def exact_pearson(x, y):
    """In rational numbers, up to the last root."""
    x, y = ([Fraction(float(number)) for number in numbers] for numbers in (x, y))
    x, y = ([number - sum(numbers) / len(numbers) for number in numbers] for numbers in (x, y))
    products = [sum(a * b for a, b in zip(u, v, strict=True)) for u, v in ((x, y), (x, x), (y, y))]
    return math.copysign(math.sqrt(products[0] ** 2 / (products[1] * products[2])), products[0])


def ranks(numbers):
    """1 to n; equal numbers share the mean of theirs."""
    return [(numbers < number).sum() + ((numbers == number).sum() + 1) / 2 for number in numbers]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1e6, -1e6])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_correlations_are_right_far_from_zero_and_of_ties(dtype, offset, scale):
    rng = np.random.default_rng(0)
    true = rng.integers(-4, 5, 200) / 2  # many ties
    predicted = (offset * scale + scale * (true + rng.normal(size=200))).astype(dtype)
    true = (offset + true).astype(dtype)
    found = correlations(true, predicted)
    assert found.pearson == pytest.approx(exact_pearson(true, predicted), rel=1e-10)
    assert found.spearman == pytest.approx(exact_pearson(ranks(true), ranks(predicted)), rel=1e-10)


def test_predictions_that_differ_in_the_last_bit_have_a_correlation_and_equal_ones_none():
    true = np.arange(6, dtype=np.float32)
    predicted = np.where(true < 3, np.float32(0.1), np.nextafter(np.float32(0.1), np.float32(1)))
    assert correlations(true, predicted) == pytest.approx((exact_pearson(true, true >= 3),) * 2)
    assert correlations(true, np.full(6, 0.1, np.float32)) == correlations(predicted[:1], true[:1]) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_leaves_no_correlation(bad):
    true = np.arange(4.0)
    assert all(map(math.isnan, correlations(true, np.array([0.0, 1.0, bad, 3.0]))))


def test_a_bag_of_bytes_learns_counts_and_no_order():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.permutation(list("a" * (1 + 4 * (i % 2)) + "b" * 5))) for i in range(80)]
    labels = np.arange(80, dtype=np.int32) % 2
    assert predict_by_bag_of_bytes(texts[:60], labels[:60], texts[60:]).tolist() == labels[60:].tolist()
    orders = ["ab" * (1 + i // 2) if i % 2 else "ba" * (1 + i // 2) for i in range(40)]
    predicted = predict_by_bag_of_bytes(orders, labels[:40], orders)
    assert (predicted[0::2] == predicted[1::2]).all()


def test_of_numbers_a_bag_of_bytes_learns_numbers():
    texts = ["x" * (1 + i % 7) + "y" for i in range(70)]
    labels = np.array([len(text) for text in texts], np.float32)
    predicted = predict_by_bag_of_bytes(texts, labels, texts)
    assert correlations(labels, predicted).spearman > 0.99
