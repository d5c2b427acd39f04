"""The settings of the three root scripts as typed models: types and ranges of every key that is not
an argument of a constructor, and which settings of a training decide its weights.

Defaults are in ``conf/``. A node with a ``_target_`` is a :data:`Node`: its class checks its values
(:func:`dd.config.check_values.check_arguments`).
"""

from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, ConfigDict, ValidationInfo, model_validator

from dd.data.photos import PILLOWS_LIMIT
from dd.evaluation.budget import Prices
from dd.stages.agree import AgreeSettings
from dd.stages.estimate import EstimateSettings
from dd.stages.pilot import PilotSettings
from dd.stages.review import ReviewSettings
from dd.stages.search import SearchSettings
from dd.stages.sweep import SweepSettings
from dd.stages.synthesize import SynthesisSettings
from dd.store.settings import (
    STRICT,
    Count,
    Hint,
    Name,
    Natural,
    NoResult,
    Parts,
    Settings,
    Share,
    Text,
    shown,
)


def _named_class(value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    if type(target := value.get("_target_")) is not str:
        raise ValueError(
            f"{info.field_name}._target_={shown(target)}: expected the class that is made of it"
        )
    return value


def _folder(value: str, info: ValidationInfo) -> str:
    if not value:
        key = info.field_name
        raise ValueError(f"{key}='': expected a folder; that of the command itself is {key}=.")
    return value


Node = Annotated[dict[str, Any], AfterValidator(_named_class)]
Choices = dict[str, Any] | list[dict[str, Any]] | None  # chosen_on of a group
Folder = Annotated[Text, AfterValidator(_folder)]
Numbers = list[float]
T = TypeVar("T")
Several = Annotated[list[T], MinLen(1)]
Scales = Annotated[Several[Annotated[float, Gt(0)]], Hint("such as [0.5,0.75,1,1.25,1.5,1.75]")]


class Recorded(NoResult):
    """The field decides a result, and the identity records the content it leads to: where."""


class Group(Settings):
    """A group of keys that the command needs complete."""

    missing: ClassVar[str] = "removed, but the command needs it; leave ~{key} out"


class Data(Group):
    noun = "data"
    name: Name
    taxonomy: str
    root: str
    masks: Text
    train_split: Text
    test_split: Text
    tune_split: str | None = None
    images: str | list[str] | None = None
    synthetic: str | None = None
    iterations: Count | None = None


class Common(Group):
    """Keys of every script."""

    name: Annotated[Parts, NoResult("where the run lies")]
    data_root: Annotated[Folder, NoResult("where data lie; what is read is recorded by content")]
    output_root: Annotated[Folder, NoResult("where runs lie")]
    seed: Natural
    device: Annotated[Text, NoResult("another kind of device changes results by rounding alone")]
    stage: Annotated[Text, NoResult("what is done with the settings")]


class Synthetic(SynthesisSettings, Common):
    """The settings of a synthetic set (conf/synthetic.yaml)."""

    data: Data
    prompts: Node
    diffusion: Node
    masks: Node
    folder: Folder
    unit_size: Count | Literal["auto"]  # type: ignore[assignment]  # a number once it is measured
    masks_from: str | None


class Quality(Group):
    noun = "quality"
    rules: dict[str, Any]
    max_share: Share
    split: Name
    clip: Node
    chosen_on: Choices = None


class Labeler(Group):
    """Settings of the labelers that are stages of their own; the others are nodes."""

    noun = "labeler"
    kind: Literal["attention", "run"] = "attention"
    run: str | None = None
    confidence: Share | None = None
    weights: Text = "ema"
    scales: Scales = [1.0]
    batch_size: Count = 16
    num_workers: Natural = 0
    flip: bool = False
    trusted: bool = False

    @model_validator(mode="after")
    def _of_a_run(self) -> Self:
        fields = type(self).model_fields.items()
        others = [name for name, field in fields if getattr(self, name) != field.default]
        others = [name for name in others if name != "kind"]
        if self.kind == "attention" and self.run is None and others:
            raise ValueError(
                f"labeler.{min(others)} has no effect on masks from attention; a trained run is "
                "the labeler with labeler.run=<folder>"
            )
        return self


def _labeler(value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    if "_target_" in value:
        return _named_class(value, info)
    return Labeler(**{k: v for k, v in value.items() if k != "chosen_on"}).model_dump()


class Caption(Group):
    noun = "caption"
    images: str | None
    folder: Folder
    batch_size: Count


class Generate(Synthetic):
    captioner: Node
    quality: Quality
    labeler: Annotated[dict[str, Any], AfterValidator(_labeler)]
    executor: Node
    mask_set: Name | None
    heat: Name | None
    reader: Name | None
    caption: Caption


class Predict(Group):
    noun = "predict"
    every: Count


class Review(ReviewSettings, Group):
    leave_out: str | None


class ReportPrices(Prices):
    noun = "report.prices"


class Report(Group):
    noun = "report"
    runs: str | None
    baseline: str | None
    gallery: Count
    domains: list[str]
    accept: Annotated[float, Ge(0), Le(100), Hint("an IoU in percent, as 70")] | None
    prices: ReportPrices


class Agree(AgreeSettings, Group):
    b: Parts | None  # type: ignore[assignment]  # null unless the stage runs


class Probe(Group):
    noun = "probe"
    split: Parts
    timesteps: list[Natural]
    limit: Count | None


class Sweep(SweepSettings, Group):
    # a file or all, until it is read
    chains: str | dict[str, Any] | None  # type: ignore[assignment]
    masks: str | None
    run: str | None


class Estimate(EstimateSettings, Group):
    pass


class Pilot(PilotSettings, Group):
    pass


class Calibrate(Group):
    noun = "calibrate"
    data: Text
    split: Parts
    shots: Count
    timesteps: list[Natural]
    cross_resolution: Several[int] | None
    self_resolution: Several[int] | None
    cross_layers: Several[list[str] | None] | None
    cross_heads: Several[list[int] | None] | None
    self_layers: Several[list[str] | None] | None
    pool: Several[Count] | None
    reading: Several[str] | None
    read_at: Several[list[Natural]] | None
    read_draws: Several[Count] | None
    mirror: Several[bool] | None


class Evaluate(Synthetic):
    run: str | None
    weights: Text
    scales: Scales
    flip: bool
    batch_size: Count
    num_workers: Natural
    split: Parts
    wandb: bool
    trusted: bool
    synthetic: Folder
    synthetic_masks: Text
    synthetic_split: Parts
    images: str | None
    output: str | None
    max_pixels: Annotated[int, Ge(1), Le(PILLOWS_LIMIT)]  # above, Pillow refuses an image
    predict: Predict
    review: Review
    report: Report
    agree: Agree
    probe: Probe
    sweep: Sweep
    estimate: Estimate
    pilot: Pilot
    calibrate: Calibrate


class Unlabelled(Group):
    noun = "unlabelled"
    images: str | None
    list: str | None


class SelfTraining(Group):
    noun = "self_training"
    teacher: Node | None
    transform: Node | None = None
    chosen_on: Choices = None


class Search(SearchSettings, Group):
    space: dict[str, Any] | str | None
    spaces: dict[str, dict[str, Any]]


class Study(Group):
    noun = "study"
    shots: list[int | str]
    seeds: list[Natural]
    domains: Several[str]
    synthetic: list[Annotated[str, MinLen(1)]] | None
    arms: list[str] | None
    experiments: dict[str, str]
    learning_rates: dict[str, Numbers | None] | None
    choose: dict[str, Any] | None
    prices: dict[str, float] | None
    targets: Numbers | None
    generation_seconds: Annotated[float, Ge(0)] | None


READS = "validation does not change the weights"
ENDS = Hint("source=synthetic and source=real are the two ends")


class Trainer(Group):
    """Lightning's trainer: a key that is not listed here is Lightning's own and decides a
    result."""

    model_config = ConfigDict(**STRICT, frozen=True, extra="allow")
    noun = "trainer"
    max_steps: int | None = None
    max_epochs: Annotated[
        int | None, NoResult("a training that ends before max_steps is not finished")
    ]
    accelerator: Annotated[Text, NoResult("another kind of device: rounding alone")]
    devices: Annotated[int | str | list[int], Recorded("processes")]
    precision: int | str | None
    callbacks: dict[str, dict[str, Any] | None]
    default_root_dir: Annotated[str | None, NoResult("where the run lies")] = None
    enable_progress_bar: Annotated[bool, NoResult("shows")]
    enable_model_summary: Annotated[bool, NoResult("shows")]
    log_every_n_steps: Annotated[Count, NoResult("how often is logged")]
    # further keys of Lightning
    num_nodes: Annotated[Any, Recorded("processes")] = None
    benchmark: Annotated[Any, NoResult("which of cuDNN's algorithms: rounding alone")] = None
    deterministic: Annotated[Any, NoResult("which of torch's algorithms: rounding alone")] = None
    detect_anomaly: Annotated[Any, NoResult("ends a training whose gradients are not finite")] = (
        None
    )
    profiler: Annotated[Any, NoResult("watches")] = None
    enable_checkpointing: Annotated[Any, NoResult("set by the callbacks")] = None
    enable_autolog_hparams: Annotated[Any, NoResult("who listens")] = None
    max_time: Annotated[Any, NoResult("a training that ends before max_steps is not finished")] = (
        None
    )
    val_check_interval: Annotated[Any, NoResult(READS)] = None
    check_val_every_n_epoch: Annotated[Any, NoResult(READS)] = None
    num_sanity_val_steps: Annotated[Any, NoResult(READS)] = None
    limit_val_batches: Annotated[Any, NoResult(f"{READS}; hold_out is recorded")] = None


class Train(Common):
    data: Annotated[Data, Recorded("trained_on: split, ids, masks and images; classes")]
    segmenter: Node
    trainer: Trainer
    logger: Annotated[str | list[str] | None, NoResult("who listens")]
    loggers: Annotated[dict[str, Node | None], NoResult("who listens")]
    search: Annotated[Search, NoResult("of stage=search, whose study has its own identity")]
    study: Annotated[Study, NoResult("of stage=study, which has an identity of its own")]
    self_training: Annotated[SelfTraining, Recorded("trained_on.self_training")]
    source: Annotated[Literal["synthetic", "real", "mixed"], Recorded("trained_on")]
    real_share: Annotated[float, Gt(0), Lt(1), ENDS, Recorded("trained_on.real_share")]
    synthetic: Annotated[Folder, Recorded("trained_on: ids, masks and how they were made")]
    synthetic_masks: Annotated[Text, Recorded("trained_on.mask_settings")]
    synthetic_split: Annotated[Parts, Recorded("trained_on: its ids")]
    shots: Annotated[Count | Literal["all"] | None, Recorded("trained_on.shots")]
    shots_list: Annotated[str | None, Recorded("trained_on.shots_list")]
    hold_out: Annotated[Count | None, Recorded("trained_on.hold_out")]
    init_from: Annotated[str | None, Recorded("init_from_sha256, trained_on.after")]
    unlabelled: Annotated[Unlabelled, Recorded("trained_on: the photographs' names and sizes")]
    batch_size: Count
    num_workers: Annotated[Natural, NoResult("a draw is a function of the seed and its position")]
    scale: Count
    transform: Node
    chosen_on: Annotated[
        dict[str, Any], NoResult("which labels chose settings; told beside the identity")
    ]
    optimizer: Node
    generator: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_its_loggers(self) -> Self:
        there = [name for name, node in self.loggers.items() if node]
        for name in [self.logger] if isinstance(self.logger, str) else self.logger or ():
            if name not in there:
                raise ValueError(f"logger={name!r}: no such logger; allowed: {', '.join(there)}")
        return self

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        for key in ("max_steps", "default_root_dir"):
            needed = self.stage not in ("generator", "adapter")  # whose parts have their own
            if needed and getattr(self.trainer, key) is None:
                raise ValueError(f"trainer.{key}: {self.missing.format(key=f'trainer.{key}')}")
        return self


def marks(model: type[Settings], kind: type[NoResult], prefix: str = "") -> dict[str, str]:
    """{key: reason} of the fields of a model, and of its groups, that are marked ``kind``."""
    found = {}
    for name, field in model.model_fields.items():
        own = [m for m in field.metadata if type(m) is kind]
        if own:
            found[f"{prefix}{name}"] = str(own[0])
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            found |= marks(field.annotation, kind, f"{prefix}{name}.")
    return found


SCRIPTS: dict[str, type[Common]] = {"generate": Generate, "evaluate": Evaluate, "train": Train}
