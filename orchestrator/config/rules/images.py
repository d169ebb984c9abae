"""Rules of ResNets on images. None looks at the data; one is told how many samples there are."""

from __future__ import annotations

from collections.abc import Mapping

from cache_store.errors import ConfigError
from orchestrator.config.rules.base import CrossChecks
from orchestrator.config.schema import ImageConfig, Regime
from orchestrator.config.yaml_loader import KeyPath
from workers.models.outline import ChainOutline
from workers.models.registry import outline
from workers.models.resnet import single_samples
from workers.specs.experiment import ResNetSpec


class ImageChecks(CrossChecks):
    """See `CrossChecks`."""

    config: ImageConfig

    def run(self, regimes: Mapping[str, Regime]) -> dict[str, ChainOutline]:
        self.image_sizes()
        self.validation_share()
        self.shortcuts()
        self.pipelines()
        outlines: dict[str, ChainOutline] = {}
        for name, regime in regimes.items():
            self.language_only(name, regime)
            self.run_exit(regime)
            chain = self.chain(regime)
            if chain is not None and self.base(regime) and self.split(regime, len(chain.blocks)):
                outlines[name] = chain
                self.stages(regime, chain)
            self.trainings(name, regime)
            self.window(name, regime)
        return outlines

    def base(self, regime: Regime) -> bool:
        if regime.row.has_base and regime.split.base < 1:
            self.report(self.locate(regime.name, "split", "base"), "0: must be at least 1 block of a ResNet")
            return False
        return True

    def language_only(self, name: str, regime: Regime) -> None:
        if regime.training.lora is not None:
            self.report(self.locate(name, "training", "lora"), "is for language models")
        if regime.training.lm_head != "train":
            self.report(self.locate(name, "training", "lm_head"), "is for language models")
        if regime.training.frozen_weights != "full":
            self.report(self.locate(name, "training", "frozen_weights"), "is for language models")
        if regime.snapshots.encoding == "fp8":
            message = "fp8: is for language models; allowed for images: plain, lossless, int8"
            self.report(self.locate(name, "snapshots", "encoding"), message)
        if regime.split.omit:
            self.report(self.locate(name, "split", "omit"), "is for language models")

    def image_sizes(self) -> None:
        data = self.config.data
        if data.resize is not None and data.resize < data.image_size:
            self.report(
                ("data", "resize"),
                f"{data.resize}: must be at least data.image_size, which is {data.image_size}",
            )

    def validation_share(self) -> None:
        data = self.config.data
        if data.validation >= 1 and data.validation != int(data.validation):
            message = f"{data.validation}: must be a fraction below 1 or a whole number of samples"
            self.report(("data", "validation"), message)

    def shortcuts(self) -> None:
        if self.config.data.name == "digits" and self.config.data.path is not None:
            self.report(("data", "path"), "digits come with scikit-learn; leave data.path out")

    def chain(self, regime: Regime) -> ChainOutline | None:
        """The outline says itself what is impossible; the count of classes does not matter for that."""
        assert isinstance(regime.model, ResNetSpec)
        try:
            return outline(regime.model, self.config.data.image_size, 10)
        except ConfigError as error:
            where = error.details.get("where", "model")
            message = error.message.removeprefix(f"{where}: ")
            path: KeyPath = tuple(str(where).split("."))
            own = self.config.regimes[regime.name].head_convs
            if path == ("model", "head_convs") and own is not None:
                path = ("regimes", regime.name, "head_convs")
            self.report(path, message)
            return None

    def stages(self, regime: Regime, chain: ChainOutline) -> None:
        """Adapters and local heads must reach the head's grid; overrides must name stages there are."""
        stages = regime.layout([block.name for block in chain.blocks])
        for stage in stages:
            try:
                if stage.adapter is not None:
                    chain.adapter(*stage.adapter)
                if stage.aux is not None:
                    chain.aux(stage.aux)
            except ConfigError as error:
                where = str(error.details.get("where", "data.image_size"))
                message = error.message.removeprefix(f"{where}: ")
                self.report(tuple(where.split(".")), f"{stage.name} of {regime.kind}: {message}")
        self.stage_names(regime, stages)
        self.wave(regime, stages)

    def single_samples(self, outlines: Mapping[str, ChainOutline], rows: int) -> None:
        """No stage may give one sample of one pixel to batch normalization. `rows`: training samples."""
        for name, chain in outlines.items():
            regime = self.config.regime(name)
            for stage in regime.layout([block.name for block in chain.blocks]):
                train, where = regime.stage_training(stage), f"{stage.name} of {regime.kind}"
                found = single_samples.refused(where, stage, chain, train, rows)
                if found is not None:
                    self.report(self._stage_key(regime, stage, *found[0]), found[1])
                    break
