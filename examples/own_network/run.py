"""Make the images, if they are not there, and train the network on them in three regimes: `python run.py`."""

from pathlib import Path

import segprop

HERE = Path(__file__).parent


def main() -> None:
    if not (HERE / "images.csv").exists():
        from make_images import make

        make()
    run = segprop.run(HERE / "own_network.yaml")
    for regime, accuracy in run.accuracy.items():
        print(f"{regime}: {accuracy:.1%} of the test images")
    model = segprop.load(run.dir, "segprop")
    print(f"segprop's network: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
