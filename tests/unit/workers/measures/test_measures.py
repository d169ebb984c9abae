"""What is measured of boundaries, against closed forms and against sums over all pairs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from workers.measures.cka import Aligned, aligned, cka, unbiased_hsic
from workers.measures.errors import error_of_mean, error_of_share, jackknife_error
from workers.measures.features import features
from workers.measures.nhsic import EPSILON, SIGMA, gaussian_gram, nhsic, smoother
from workers.measures.probe import probe_accuracy, ridge
from workers.measures.spectrum import effective_rank, singular_values, singular_values_without
from workers.measures.table import Known, Seen, measure
from workers.specs.tasks import MOST_FEATURES, Bandwidth, Measure


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int) -> Tensor:
    turned: Tensor = torch.linalg.qr(draw(size, size, seed=9)).Q
    return turned


# -- nHSIC --------------------------------------------------------------------------------------------------


def test_the_kernel_is_that_of_the_formula() -> None:
    samples = draw(7, 3)
    for i in range(7):
        for j in range(7):
            squared = sum(float(samples[i, k] - samples[j, k]) ** 2 for k in range(3))
            assert float(gaussian_gram(samples)[i, j]) == pytest.approx(math.exp(-squared / (2 * SIGMA**2 * 3)))


def test_nhsic_is_that_of_the_source_which_centres_one_side_and_inverts() -> None:
    one, other = draw(60, 5), draw(60, 3, seed=1).relu()

    def of_the_source(samples: Tensor) -> Tensor:
        size = len(samples)
        eye = torch.eye(size, dtype=torch.float64)
        kernel = gaussian_gram(samples) @ (eye - 1 / size)
        return kernel @ torch.inverse(kernel + EPSILON * size * eye)

    expected = float((of_the_source(one) * of_the_source(other).T).sum())
    assert nhsic(smoother(one), smoother(other)) == pytest.approx(expected, rel=1e-8)


def test_nhsic_of_targets_with_themselves_counts_classes_but_one() -> None:
    # Of c equally frequent classes K has c - 1 equal eigenvalues λ = (1 - k) m / c, k the kernel of two classes.
    classes, size = 4, 80
    targets = F.one_hot(torch.arange(size) % classes, classes)
    own = (1 - math.exp(-2 / (2 * SIGMA**2 * classes))) * size / classes
    expected = (classes - 1) * (own / (own + EPSILON * size)) ** 2
    assert nhsic(smoother(targets), smoother(targets)) == pytest.approx(expected, rel=1e-9)


def test_nhsic_tells_what_depends_from_what_does_not() -> None:
    targets = torch.arange(200) % 4
    one_hot = smoother(F.one_hot(targets, 4))
    telling = smoother(draw(200, 4) + 3 * F.one_hot(targets, 4))
    silent = smoother(draw(200, 4, seed=3))
    assert nhsic(telling, one_hot) > 2.3 > 4 * nhsic(silent, one_hot)
    # Neither rotation nor a shift is seen by a kernel of distances.
    samples = draw(50, 6)
    moved = samples @ rotation(6) + 5
    assert nhsic(smoother(moved), smoother(samples)) == pytest.approx(nhsic(*[smoother(samples)] * 2), rel=1e-6)


def test_the_published_width_sees_no_small_activations_and_the_median_sees_them_at_any_scale() -> None:
    targets = torch.arange(120) % 4
    samples = draw(120, 6) + 3 * F.one_hot(targets, 6)
    small, one_hot = 1e-3 * samples, F.one_hot(targets, 4)
    assert nhsic(smoother(small), smoother(one_hot)) < 0.01
    cases: tuple[tuple[Bandwidth, bool], ...] = (("fixed", False), ("median", True))
    for bandwidth, same in cases:
        found = [nhsic(smoother(each, bandwidth), smoother(one_hot, bandwidth)) for each in (samples, small)]
        assert (found[0] == pytest.approx(found[1], rel=1e-6)) is same
        assert found[0] > 2.3
    pairs = torch.pdist(samples) ** 2
    kernel = gaussian_gram(samples, "median")
    assert float(kernel[0, 1]) == pytest.approx(math.exp(-float(pairs[0]) / (2 * float(pairs.median()))))
    # Most samples are the same, or all of them.
    rare = torch.cat([torch.zeros(9, 2), torch.ones(1, 2)]).double()
    assert float(gaussian_gram(rare, "median")[0, 9]) == pytest.approx(math.exp(-2 / (2 * 9 * 2 / 45)))
    assert torch.equal(gaussian_gram(torch.zeros(5, 2), "median"), torch.ones(5, 5))


# -- CKA ----------------------------------------------------------------------------------------------------


def test_the_unbiased_criterion_is_the_sum_over_all_quadruples() -> None:
    size = 7
    one, other = (matrix @ matrix.T for matrix in (draw(size, 3), draw(size, 2, seed=1)))
    total, count = 0.0, 0
    for i in range(size):
        for j in range(size):
            for q in range(size):
                for r in range(size):
                    if len({i, j, q, r}) == 4:
                        total += float(one[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q]))
                        count += 1
    assert unbiased_hsic(one, other) == pytest.approx(total / count, rel=1e-9)


def test_cka_of_turned_and_scaled_features_is_1_in_every_block() -> None:
    samples = draw(40, 6)
    turned = 3 * samples @ rotation(6) + 7
    blocks = [aligned(samples[cut], turned[cut]) for cut in (slice(0, 20), slice(20, 40))]
    assert cka(blocks) == pytest.approx(1, abs=1e-10)
    assert cka(blocks[:1]) == pytest.approx(1, abs=1e-10)


def test_cka_of_independent_features_is_0_in_expectation_however_many_features_there_are() -> None:
    # More features than samples of a block: the plain estimate is far above 0.
    blocks = [aligned(draw(32, 64, seed=2 * n), draw(32, 64, seed=2 * n + 1)) for n in range(200)]
    values = [cka([block]) for block in blocks]
    assert abs(sum(values) / len(values)) < 3 * error_of_mean(values) < 0.02
    assert math.isnan(cka([Aligned(0.0, 0.0, 1.0)]))


def test_cka_in_feature_space_is_what_blocks_come_to() -> None:
    one, other = draw(4000, 5), draw(4000, 5)
    other = one @ draw(5, 4, seed=7) + draw(4000, 4, seed=8)
    centred = [features - features.mean(dim=0) for features in (one, other)]
    cross, own, theirs = (
        float((a.T @ b).norm() ** 2) for a, b in ((centred[0], centred[1]), [centred[0]] * 2, [centred[1]] * 2)
    )
    blocks = [aligned(one[start : start + 500], other[start : start + 500]) for start in range(0, 4000, 500)]
    without = [cka(blocks[:index] + blocks[index + 1 :]) for index in range(8)]
    assert abs(cka(blocks) - cross / math.sqrt(own * theirs)) < 4 * jackknife_error(without) < 0.04


# -- effective rank -----------------------------------------------------------------------------------------


def test_effective_rank_of_equal_values_is_their_number_and_of_one_is_1() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == 1
    assert effective_rank(torch.zeros(3)) == 0
    # Twice as strong: p = 2/3, 1/3.
    expected = math.exp(-2 / 3 * math.log(2 / 3) - 1 / 3 * math.log(1 / 3))
    assert effective_rank(torch.tensor([2.0, 1.0])) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(40, 6), (20, 33)])
def test_singular_values_are_those_of_the_centred_matrix_of_all_samples_and_without_a_group(
    shape: tuple[int, int],
) -> None:
    samples = draw(*shape) + 4
    assert torch.allclose(largest(singular_values(samples), 6), brute(samples), atol=1e-6)
    parts = torch.tensor_split(samples, 5)
    for index, found in enumerate(singular_values_without(samples, 5)):
        rest = torch.cat([part for place, part in enumerate(parts) if place != index])
        assert torch.allclose(largest(found, 6), brute(rest), atol=1e-6)


def largest(values: Tensor, count: int) -> Tensor:
    return values.flip(0)[:count]


def brute(samples: Tensor) -> Tensor:
    found: Tensor = torch.linalg.svdvals(samples - samples.mean(dim=0))
    return found[:6]


# -- probes -------------------------------------------------------------------------------------------------


def test_ridge_is_least_squares_over_samples_with_the_penalty_below_them() -> None:
    samples, targets = draw(30, 4), draw(30, 2, seed=1)
    below = torch.cat([samples, math.sqrt(2.0) * torch.eye(4, dtype=torch.float64)])
    expected = torch.linalg.lstsq(below, torch.cat([targets, torch.zeros(4, 2, dtype=torch.float64)])).solution
    assert torch.allclose(ridge(samples, targets, 2.0), expected)


def test_a_probe_tells_classes_that_a_plane_parts_and_guesses_where_nothing_is_to_be_seen() -> None:
    targets = torch.arange(400) % 4
    parted = 0.1 * draw(400, 4) + F.one_hot(targets, 4)
    train, test = slice(0, 200), slice(200, 400)
    one_hot = F.one_hot(targets, 4)
    assert probe_accuracy(parted[train], one_hot[train], parted[test], targets[test]) == 1
    blank = torch.ones(400, 3)
    assert probe_accuracy(blank[train], one_hot[train], blank[test], targets[test]) == 0.25
    noise = draw(400, 3, seed=5)
    assert probe_accuracy(noise[train], one_hot[train], noise[test], targets[test]) < 0.4


# -- errors -------------------------------------------------------------------------------------------------


def test_errors_are_those_of_the_textbook() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    assert error_of_mean(values) == pytest.approx(float(torch.tensor(values).std()) / 2)
    assert error_of_mean([3.0]) == jackknife_error([3.0]) == 0
    # Of a mean the jackknife's error is the standard error.
    without = [(sum(values) - value) / 3 for value in values]
    assert jackknife_error(without) == pytest.approx(error_of_mean(values))
    assert error_of_share(0.5, 100) == pytest.approx(0.05)


def test_stated_errors_cover_what_other_samples_say() -> None:
    """Of 40 draws, the mean of the stated errors is within a third of the spread of the figures."""
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(40):
        targets = torch.arange(480) % 4
        inputs = draw(480, 6, seed=seed) + F.one_hot(targets, 6)
        seen = Seen(inputs.relu()[:400], inputs.relu()[400:], (inputs @ rotation(6)).relu()[:400])
        known = Known.of(inputs[:400], targets[:400], targets[400:], 4)
        for name, value in measure(seen, known, ("nhsic", "cka", "probe", "effective_rank")).items():
            found.setdefault(name, []).append((value.value, value.error))
    for name, figures in found.items():
        values, errors = (torch.tensor(each) for each in zip(*figures, strict=True))
        ratio = float(errors.mean() / values.std())
        assert 0.6 < ratio < 1.7, (name, ratio)


# -- features -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "width"),
    [
        (((64, 32, 32),), 64 * 4 * 4),
        (((512, 4, 4), (512, 4, 4)), 1024),
        (((3, 8, 8),), 3 * 8 * 8),
        (((65, 192),), 5 * 192),
        (((300,),), 300),
        (((2, 3, 4, 5),), 120),
        (((2048, 7, 7),), MOST_FEATURES),
        (((5000,),), MOST_FEATURES),
    ],
)
def test_features_are_as_fine_as_fits(shapes: tuple[tuple[int, ...], ...], width: int) -> None:
    found = features(tuple(torch.randn(2, *shape) for shape in shapes))
    assert (found.shape, found.dtype) == ((2, width), torch.float32)


def test_maps_are_averaged_over_squares_and_tokens_over_runs() -> None:
    maps = torch.arange(2 * 512 * 4 * 4.0).view(2, 512, 4, 4)
    assert torch.equal(features((maps,)), F.adaptive_avg_pool2d(maps, 1).flatten(1))
    wide = maps.view(2, 128, 8, 8)
    assert torch.equal(features((wide,)), F.avg_pool2d(wide, 4).flatten(1))
    tokens = torch.arange(2 * 4 * 500.0).view(2, 4, 500)
    expected = torch.stack([tokens[:, :2].mean(dim=1), tokens[:, 2:].mean(dim=1)], dim=2)
    assert torch.equal(features((tokens,)), expected.flatten(1))


def test_what_is_wider_keeps_its_distances_about() -> None:
    wide = torch.randn(20, 6000, generator=torch.Generator().manual_seed(0))
    before, after = torch.pdist(wide), torch.pdist(features((wide,)))
    assert float(((after / before) - 1).abs().max()) < 0.12


# -- together -----------------------------------------------------------------------------------------------


def test_blocks_are_averaged_and_what_has_no_reference_has_no_cka() -> None:
    inputs, targets = draw(100, 5), torch.arange(100) % 3
    known = Known.of(inputs, targets, targets[:10], 3)
    assert [(cut.start, cut.stop) for cut in known.cuts] == [(0, 25), (25, 50), (50, 75), (75, 100)]
    seen = Seen(inputs.relu(), inputs[:10].relu())
    found = measure(seen, known, ("cka", "nhsic"))
    assert list(found) == ["nhsic_inputs", "nhsic_targets"]
    each = [nhsic(smoother(inputs.relu()[cut]), smoother(inputs[cut])) for cut in known.cuts]
    assert found["nhsic_inputs"].value == pytest.approx(sum(each) / 4)
    assert found["nhsic_inputs"].error == pytest.approx(error_of_mean(each))


@pytest.mark.parametrize("name", ["nhsic", "cka", "probe", "effective_rank"])
def test_a_constant_boundary_has_figures_that_are_numbers_or_none(name: Measure) -> None:
    same, few = torch.ones(80, 4), torch.ones(20, 4)
    targets = torch.arange(80) % 2
    known = Known.of(draw(80, 3), targets, targets[:20], 2)
    found = measure(Seen(same, few, draw(80, 4)), known, (name,))
    assert all(value.finite for value in found.values())
    assert ("cka" in found) is False
