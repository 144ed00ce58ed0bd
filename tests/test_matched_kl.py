"""Equal KL, and differences over seeds: hand-worked values, known tables, coverage."""

import math

import matched_kl as m
import numpy as np
import pytest


def test_a_quadratic_in_the_root_of_the_kl_is_read_back_exactly():
    kls = [0.0, 0.01, 0.25, 1.0, 2.25, 4.41]
    values = [50 + 10 * math.sqrt(kl) - 1.5 * kl for kl in kls]
    assert m.read(kls, values, 2.0) == pytest.approx(50 + 10 * math.sqrt(2) - 3)
    assert m.distance_at(kls, values, 55.0) == pytest.approx(
        (10 - math.sqrt(100 - 4 * 1.5 * 5)) / 3
    )


def test_a_curve_read_by_straight_lines_goes_through_its_checkpoints():
    """Between sqrt(KL) 1 and 2, at sqrt(2.25) = 1.5: half way from 60 to 70."""
    kls, values = [0.0, 1.0, 4.0, 4.41], [50.0, 60.0, 70.0, 71.0]
    assert m.read(kls, values, 2.25, straight=True) == pytest.approx(65.0)
    assert [m.read(kls, values, x, straight=True) for x in (1.0, 4.0)] == [60.0, 70.0]
    assert m.read(kls, values, 5.0, straight=True) is None


def test_what_would_be_extrapolated_is_missing():
    kls, values = [0.0, 0.1, 0.4, 0.9, 1.9], [50.0, 51.0, 52.0, 53.0, 54.0]
    assert m.read(kls, values, 1.0) is not None
    assert m.read(kls, values, 2.0) is None
    assert m.read(kls[:3], values[:3], 0.1) is None  # three points make no quadratic
    assert m.distance_at(kls, values, 60.0) is None


def test_checkpoints_after_the_first_one_past_the_largest_kl_have_no_part():
    kls, values = [0.0, 1.0, 2.0, 3.0, 5.0], [50.0, 55.0, 57.0, 58.0, 60.0]
    read = m.read(kls, values, 1.5)
    assert m.read([*kls, 9.0], [*values, 0.0], 1.5) == read
    assert m.read([*kls[:4], 3.9], [*values[:4], 0.0], 1.5) != read  # this one is before it


def test_win_rates_of_all_of_even_and_of_odd_stories():
    pool = [100, 200, 300, 300]
    row = {"checkpoints": [{"kl": 0.0, "scores": [150, 300, 50, 400]}]}
    # 150 beats 1 of 4; 300 beats 2 and ties with 2; 50 none; 400 all
    assert m.win_rates(row, pool) == [pytest.approx(100 * (0.25 + 0.75 + 0 + 1) / 4)]
    assert m.win_rates(row, pool, half=0) == [pytest.approx(100 * (0.25 + 0) / 2)]
    assert m.win_rates(row, pool, half=1) == [pytest.approx(100 * (0.75 + 1) / 2)]


@pytest.mark.parametrize(
    "freedom,t", [(1, 12.7062), (2, 4.3027), (4, 2.7764), (16, 2.1199), (1000, 1.9623)]
)
def test_student_as_in_the_tables(freedom, t):
    assert m.quantile(freedom) == pytest.approx(t, abs=2e-4)
    assert m.tail(t, freedom) == pytest.approx(0.025, abs=1e-5)
    assert m.tail(-t, freedom) == pytest.approx(0.975, abs=1e-5)
    assert m.tail(0.0, freedom) == pytest.approx(0.5)


def test_contrasts_by_hand():
    a, b = m.contrasts({"a": [1.0, 2.0, 3.0], "b": [0.0, 1.0, -1.0], "alone": [5.0]})
    # Both deviate by 1, and so do both together (4 degrees of freedom). The mean of three deviates
    # by 1 / sqrt(3). Its own 2 degrees of freedom make the wider interval: t = 4.303.
    assert (a.name, a.seeds, a.mean, a.deviation) == ("a", 3, 2.0, 1.0)
    assert a.high - a.mean == pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)
    assert a.p_zero == pytest.approx(2 * 2 * m.tail(2 * math.sqrt(3), 2))  # the smaller of two
    assert b.p_zero == pytest.approx(1.0)
    assert b.p_margin == pytest.approx(2 * m.tail(3 * math.sqrt(3), 2))  # the smaller of two
    assert a.p_margin == pytest.approx(m.tail(math.sqrt(3), 2))
    assert a.verdict == b.verdict == "not decided"
    assert str(b) == "+0.0 [-2.5, +2.5]"


def test_of_two_deviations_the_larger_p_counts():
    quiet, loud = m.contrasts({"quiet": [1.0, 1.1, 0.9], "loud": [6.0, 0.0, -6.0]})
    both = math.sqrt((0.02 + 72) / 4)
    assert quiet.high - 1 == pytest.approx(2.7764 * both / math.sqrt(3), abs=1e-3)  # of all
    assert loud.high == pytest.approx(4.3027 * 6 / math.sqrt(3), abs=2e-3)  # its own


@pytest.mark.parametrize(
    "values,verdict",
    [
        ([0.1, -0.1, 0.05, 0.0], "no difference"),
        ([1.0, 1.1, 0.9], "higher, by less than 3"),
        ([9.0, 0.0, -6.0], "not decided"),
        ([-5.0, -6.0, -7.0], "lower"),
    ],
)
def test_verdicts(values, verdict):
    (contrast,) = m.contrasts({"": values})
    assert contrast.verdict == verdict


def test_too_few_seeds_are_no_contrast():
    assert m.contrasts({}) == [] and m.contrasts({"one": [1.0]}) == []


def test_holm_by_hand():
    assert m.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert m.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("loudest", [1.5, 4.0])
def test_intervals_hold_the_truth_and_tests_err_as_seldom_as_they_say(loudest):
    """400 studies of 8 contrasts and 6 seeds, one of them perhaps noisier than the others."""
    rng = np.random.default_rng(0)
    scales = [1.5] * 7 + [loudest]

    def study(mean: float) -> list[m.Contrast]:
        return m.contrasts({str(i): rng.normal(mean, s, 6) for i, s in enumerate(scales)})

    without = [study(0.0) for _ in range(400)]
    held = np.array([[c.low <= 0 <= c.high for c in found] for found in without])
    assert held.mean() >= 0.94 and held[:, -1].mean() >= 0.93
    assert np.mean([any(c.p_zero < m.LEVEL for c in found) for found in without]) <= 0.07
    at_margin = [study(m.MARGIN) for _ in range(400)]  # a difference of 3 is not called none
    called = [any(c.verdict == "no difference" for c in found) for found in at_margin]
    assert np.mean(called) <= 0.05


def test_a_deviation_has_the_interval_of_chi_square():
    values = np.array([-1.0, 1.0] * 4) * math.sqrt(7 / 8)  # deviation 1, of 8
    deviation, low, high = m.spread(values)
    # chi-square's quantiles with 7 degrees of freedom are 1.690 and 16.013
    assert deviation == pytest.approx(1.0)
    assert low == pytest.approx(math.sqrt(7 / 16.013), abs=3e-3)
    assert high == pytest.approx(math.sqrt(7 / 1.690), abs=6e-3)


def test_a_bootstrap_of_three_seeds_reaches_from_the_smallest_to_the_largest():
    assert m.bootstrap([1.0, 2.0, 7.0]) == (1.0, 7.0)
    low, high = m.bootstrap(list(range(8)))
    assert 1.7 < low < 2.1 and 4.9 < high < 5.3
