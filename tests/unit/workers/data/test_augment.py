from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from data_makers import digit_images
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from cache_store.errors import ConfigError
from workers.data.images.augment import augment as module
from workers.data.images.augment import resample
from workers.data.images.augment.augment import Augment
from workers.data.images.augment.draws import Draws, crop_boxes, erase_boxes, flips
from workers.data.images.augment.rand_augment import OPERATIONS, rand_augment, rand_operations
from workers.data.images.augment.resample import Resampler

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
MANY = np.arange(40_000)


def make(augment: str = "paper", native: int = 32, size: int = 32, **changes: Any) -> Augment:
    settings = {"resize": round(size * 256 / 224), "flip": True, "seed": 11} | changes
    return Augment(augment=augment, native=native, size=size, mean=MEAN, std=STD, **settings)  # type: ignore[arg-type]


def real(count: int, side: int = 32) -> Tensor:
    return torch.from_numpy(digit_images(count, side)[0].transpose(0, 3, 1, 2).copy())


def noise(count: int, side: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


# --- a view is a function of (seed, sample, view) alone


@settings(max_examples=60, deadline=None)
@given(
    augment=st.sampled_from(["paper", "light", "none"]),
    shape=st.sampled_from([(32, 32), (32, 16), (8, 16), (32, 40)]),
    order=st.permutations(range(24)),
    cuts=st.lists(st.integers(1, 23), max_size=4, unique=True),
    view=st.integers(0, 5),
    threads=st.sampled_from([1, 2]),
)
def test_a_view_is_the_same_bits_in_any_batch_order_and_thread_count(
    augment: str, shape: tuple[int, int], order: list[int], cuts: list[int], view: int, threads: int
) -> None:
    images, samples = noise(24, shape[0]), np.arange(100, 124)
    whole = make(augment, *shape)(images, samples, view)
    pieces = make(augment, *shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for part in np.split(np.array(order), sorted(cuts)):
            assert torch.equal(pieces(images[part], samples[part], view), whole[part])
    finally:
        torch.set_num_threads(before)


def test_a_large_batch_gives_what_single_images_give() -> None:
    images, samples = noise(700), np.arange(700) * 7919
    augment = make()
    whole = augment(images, samples, 2)
    for row in range(0, 700, 23):
        assert torch.equal(augment(images[row : row + 1], samples[row : row + 1], 2)[0], whole[row])


def test_a_batch_that_is_cut_into_chunks_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    images, samples = noise(20), np.arange(20)
    whole = make()(images, samples, 0)
    monkeypatch.setattr(resample, "_CHUNK_ELEMENTS", 3 * 32 * 32 * 7)
    assert torch.equal(make()(images, samples, 0), whole)


def test_a_full_table_of_weights_starts_over_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    images, samples = noise(50), np.arange(50)
    whole = make()(images, samples, 0)
    monkeypatch.setattr(resample, "_TABLE_BYTES", 1 << 12)
    small = make()
    small(images, samples + 50, 0)
    assert torch.equal(small(images, samples, 0), whole)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_precision_settings_and_autocast_do_not_change_a_view(precision: str) -> None:
    images, samples = noise(64), np.arange(64)
    whole = make()(images, samples, 0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            again = make()(images, samples, 0)
    finally:
        torch.set_float32_matmul_precision(before)
    assert again.dtype == torch.float32
    assert torch.equal(again, whole)


def test_no_generator_is_used() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    make()(noise(8), np.arange(8), 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_views_samples_and_seeds_draw_differently() -> None:
    images = real(1).expand(64, -1, -1, -1)
    first = make()(images, np.arange(64), 0)
    assert len({row.numpy().tobytes() for row in first}) > 60
    assert not torch.equal(first, make()(images, np.arange(64), 1))
    assert not torch.equal(first, make(seed=12)(images, np.arange(64), 0))
    assert torch.equal(make()(images, np.arange(64), None), make("none")(images, np.arange(64), 3))


def test_the_draws_are_pinned() -> None:
    # Another machine or numpy must draw the same numbers: they decide the bytes of snapshots.
    draws = Draws(123456789, np.array([0, 1, 49_999]), 2)
    assert draws.bits(7, 2).tolist() == PINNED_BITS
    assert crop_boxes(draws, 37).height.tolist() == PINNED_HEIGHTS


PINNED_BITS = [[1268711573, 1803718943], [3130998071, 1132776322], [2165498524, 1062115195]]
PINNED_HEIGHTS = [34, 28, 33]

# --- statistics of the draws


def uniform_p(values: np.ndarray, bins: int) -> float:
    return float(stats.chisquare(np.bincount(values, minlength=bins)).pvalue)


def test_uniforms_are_uniform_and_independent_between_draws_samples_and_views() -> None:
    draws = Draws(3, MANY, 0)
    values = draws.uniform(0, 12)
    assert values.min() >= 0
    assert values.max() < 1
    for column in range(12):
        assert stats.kstest(values[:, column], "uniform").pvalue > 1e-4
    near_zero = 5 / math.sqrt(len(MANY))
    correlation = np.corrcoef(values, rowvar=False) - np.eye(12)
    assert np.abs(correlation).max() < near_zero
    assert abs(np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1]) < near_zero
    assert abs(np.corrcoef(values[:, 0], Draws(3, MANY, 1).uniform(0)[:, 0])[0, 1]) < near_zero
    assert abs(np.corrcoef(values[:, 0], Draws(4, MANY, 0).uniform(0)[:, 0])[0, 1]) < near_zero


def test_half_the_samples_are_flipped() -> None:
    assert abs(flips(Draws(0, MANY, 0)).mean() - 0.5) < 0.01


def test_every_operation_is_as_likely_in_both_slots_with_either_sign() -> None:
    draws = Draws(0, MANY, 0)
    first, first_sign = rand_operations(draws, 0)
    second, second_sign = rand_operations(draws, 1)
    assert len(OPERATIONS) == 14
    assert uniform_p(first, 14) > 1e-4
    assert uniform_p(second * 14 + first, 196) > 1e-4
    assert uniform_p(first_sign * 2 + second_sign, 4) > 1e-4


def test_crops_have_the_distribution_of_torchvisions() -> None:
    side = 256
    boxes = crop_boxes(Draws(1, np.arange(4000), 0), side)
    reference = v2.RandomResizedCrop(224, scale=(0.6, 1.0))
    torch.manual_seed(0)
    blank = torch.empty(3, side, side, dtype=torch.uint8)
    theirs = [reference.make_params([blank]) for _ in range(4000)]
    for ours, name in (
        (boxes.height, "height"),
        (boxes.width, "width"),
        (boxes.top, "top"),
        (boxes.left, "left"),
    ):
        assert stats.ks_2samp(ours, [params[name] for params in theirs]).pvalue > 1e-3, name
    area = boxes.height * boxes.width / side**2
    ratio = boxes.width / boxes.height
    assert 0.595 < area.min() < 0.62
    assert 0.95 < area.max() <= 1.0
    assert 0.74 < ratio.min() < 0.8 < 1.25 < ratio.max() < 1.35
    assert boxes.found.all()


@pytest.mark.parametrize("side", [4, 9, 18, 37])
def test_crops_lie_inside_the_image_and_reach_every_edge(side: int) -> None:
    boxes = crop_boxes(Draws(2, MANY, 0), side)
    assert (boxes.height > 0).all()
    for start, length in ((boxes.top, boxes.height), (boxes.left, boxes.width)):
        assert start.min() == 0
        assert (start + length).max() == side
        assert (start + length <= side).all()


def test_a_quarter_is_erased_with_the_boxes_of_torchvision() -> None:
    side = 64
    boxes = erase_boxes(Draws(1, MANY, 0), side)
    assert abs(boxes.found.mean() - 0.25) < 0.01
    reference = v2.RandomErasing(1.0, (0.02, 0.2), (0.3, 3.3))
    torch.manual_seed(0)
    blank = torch.empty(3, side, side)
    theirs = [reference.make_params([blank]) for _ in range(4000)]
    some = np.flatnonzero(boxes.found)[:4000]
    for ours, name in ((boxes.height, "h"), (boxes.width, "w"), (boxes.top, "i"), (boxes.left, "j")):
        assert stats.ks_2samp(ours[some], [params[name] for params in theirs]).pvalue > 1e-3, name


# --- pixels are torchvision's


def grey_levels(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours.to(torch.int32) - theirs.to(torch.int32)).abs()


@pytest.mark.parametrize(
    ("native", "resize", "size"), [(32, 37, 32), (32, 18, 16), (8, 18, 16), (32, 64, 56), (48, 48, 42)]
)
def test_resize_and_crop_match_torchvision_within_two_grey_levels(native: int, resize: int, size: int) -> None:
    images = torch.cat([real(40, native), noise(40, native)])
    boxes = crop_boxes(Draws(4, np.arange(80), 0), resize)
    resampler = Resampler(native, resize, size)
    ours = Resampler.apply(
        images, resampler.matrices(boxes.top, boxes.height), resampler.matrices(boxes.left, boxes.width)
    )
    worst, total = 0, 0.0
    for row in range(80):
        resized = F.resize(images[row], [resize, resize], antialias=True)
        box = (int(v[row]) for v in (boxes.top, boxes.left, boxes.height, boxes.width))
        theirs = F.resized_crop(resized, *box, [size, size], antialias=True)
        difference = grey_levels(ours[row], theirs)
        worst, total = max(worst, int(difference.max())), total + difference.float().mean().item()
    assert worst <= 2
    assert total / 80 < 0.5


@pytest.mark.parametrize(
    ("native", "resize", "size"), [(32, 37, 32), (32, 18, 16), (8, 18, 16), (37, 37, 32), (16, 19, 16)]
)
def test_the_evaluation_transform_matches_torchvision(native: int, resize: int, size: int) -> None:
    images = torch.cat([real(20, native), noise(20, native)])
    reference = v2.Compose(
        [
            v2.Resize(resize, antialias=True),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    ours = make("paper", native, size, resize=resize)(images, np.arange(40), None)
    # One grey level of the narrowest channel, and float rounding where nothing is resampled.
    bound = 1 / 255 / min(STD) + 1e-5 if native != resize else 1e-5
    assert (ours - reference(images)).abs().max() <= bound


def test_flat_images_stay_flat_under_resampling() -> None:
    for value in (0, 1, 127, 254, 255):
        images = torch.full((30, 3, 32, 32), value, dtype=torch.uint8)
        augment = make("light")
        boxes = crop_boxes(Draws(0, np.arange(30), 0), 37)
        rows = augment._resampler.matrices(boxes.top, boxes.height)
        assert (Resampler.apply(images, rows, rows) == value).all()


def test_flipped_views_are_mirror_images() -> None:
    images, samples = real(64), np.arange(64)
    plain = make("light", flip=False)(images, samples, 0)
    flipped = make("light", flip=True)(images, samples, 0)
    mirrored = flips(Draws(11, samples, 0))
    assert torch.equal(flipped[mirrored], plain[mirrored].flip(-1))
    assert torch.equal(flipped[~mirrored], plain[~mirrored])
    assert 0 < mirrored.sum() < 64


def reference_magnitude(name: str, side: int) -> tuple[float, bool]:
    space, signed = v2.RandAugment._AUGMENTATION_SPACE[name]
    magnitudes = space(31, side, side)
    return (0.0 if magnitudes is None else float(magnitudes[9])), signed


@pytest.mark.parametrize("side", [4, 16, 32, 33, 224])
@pytest.mark.parametrize("index", range(14))
def test_operations_are_torchvisions_at_magnitude_nine(index: int, side: int) -> None:
    operation = OPERATIONS[index]
    assert operation.name == list(v2.RandAugment._AUGMENTATION_SPACE)[index]
    count = 12 if side < 100 else 2
    images = torch.cat([real(count, side), noise(count, side)])
    images[0] = 77  # flat
    images[1, 0] = images[1, 0] // 2 + 30  # a channel without extremes
    magnitude, signed = reference_magnitude(operation.name, side)
    assert operation.signed == signed
    for negative in (False, True) if signed else (False,):
        theirs = v2.RandAugment()._apply_image_or_video_transform(
            images.clone(),
            operation.name,
            -magnitude if negative else magnitude,
            F.InterpolationMode.NEAREST,
            {},
        )
        ours = operation.apply(images.clone(), negative)
        assert ours.dtype == torch.uint8
        difference = grey_levels(ours, theirs)
        exact = operation.name in {"Identity", "Posterize", "Solarize", "Equalize"}
        if exact or operation.name[:5] in {"Shear", "Trans", "Rotat"}:
            assert difference.max() == 0
        else:
            assert difference.max() <= 1


def test_rand_augment_applies_both_slots_in_order() -> None:
    images = noise(300)
    draws = Draws(8, np.arange(300), 1)
    ours = rand_augment(images.clone(), draws)
    slots = [rand_operations(draws, slot) for slot in range(2)]
    for row in range(300):
        expected = images[row : row + 1]
        for operations, negative in slots:
            expected = OPERATIONS[operations[row]].apply(expected.clone(), bool(negative[row]))
        assert torch.equal(ours[row], expected[0])


def test_erasing_zeroes_one_box_after_normalisation() -> None:
    images, samples = torch.full((400, 3, 32, 32), 200, dtype=torch.uint8), np.arange(400)
    draws = Draws(11, samples, 0)
    out = module._erase(make("light")(images, samples, 0), draws)
    boxes = erase_boxes(draws, 32)
    for row in range(400):
        expected = torch.zeros(32, 32, dtype=torch.bool)
        if boxes.found[row]:
            top, left = int(boxes.top[row]), int(boxes.left[row])
            expected[top : top + int(boxes.height[row]), left : left + int(boxes.width[row])] = True
        assert torch.equal((out[row] == 0).all(0), expected)


def test_light_neither_recolours_nor_erases() -> None:
    images = torch.full((200, 3, 32, 32), 90, dtype=torch.uint8)
    light = make("light")(images, np.arange(200), 0)
    assert torch.equal(light, make("none")(images, np.arange(200), None))
    assert not torch.equal(make("paper")(images, np.arange(200), 0), light)


def test_output_is_float32_contiguous_and_inputs_are_left_alone() -> None:
    images = noise(40)
    before = images.clone()
    for name in ("paper", "light", "none"):
        out = make(name, resize=32)(images, np.arange(40), 0)
        assert out.dtype == torch.float32
        assert out.is_contiguous()
        assert torch.equal(images, before)
    empty = make()(images[:0], np.arange(0), 0)
    assert empty.shape == (0, 3, 32, 32)


def test_a_resize_below_the_crop_is_refused() -> None:
    with pytest.raises(ConfigError, match="allowed: 32 or more"):
        make(resize=31)
