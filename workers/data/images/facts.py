"""What is known of the named data sets beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
Triple = tuple[float, float, float]

_CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_NAMES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly "
    "camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup "
    "dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower "
    "leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid "
    "otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray "
    "road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar "
    "sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle "
    "wardrobe whale willow_tree wolf woman worm"
)


@dataclass(frozen=True)
class ImageFacts:
    """What is known of a data set beforehand. `mean` and `std` normalise pixels scaled to 0..1 by channel."""

    mean: Triple
    std: Triple
    class_names: tuple[str, ...] = ()
    #: Side of the stored images; None: they are stored at the side given by `resize`.
    side: int | None = None
    #: Images for training and for testing, of data sets that can be downloaded.
    rows: tuple[int, int] | None = None


DIGITS = ImageFacts(
    # Of the 1,437 training images, as stored (0..255).
    mean=(0.3053, 0.3053, 0.3053),
    std=(0.3761, 0.3761, 0.3761),
    class_names=tuple("0123456789"),
    side=8,
)
CIFAR10 = ImageFacts(
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    class_names=tuple(_CIFAR10_NAMES.split()),
    side=32,
    rows=(50_000, 10_000),
)
CIFAR100 = ImageFacts(
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    class_names=tuple(_CIFAR100_NAMES.split()),
    side=32,
    rows=(50_000, 10_000),
)
#: Of images of any kind: the figures of ImageNet.
ANY_IMAGES = ImageFacts(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
