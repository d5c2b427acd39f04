"""From a Hydra configuration to plain objects: the only importer of Hydra beside the root scripts.

Only targets whose own module and name begin with an allowed prefix are instantiated; this is
checked on the resolved object. For a mistyped override, the error lists the existing names before
any work starts.
"""

import os

os.environ.setdefault(
    "TRANSFORMERS_VERBOSITY", "error"
)  # read by the imports below: hides advice about optional packages

from dd.config.adaptation import adaptation
from dd.config.call import composed
from dd.config.command import exit_code, main
from dd.config.composition import CONF, compose
from dd.config.deployment import deploy_arguments, key_values, page_arguments
from dd.config.evaluation import (
    prediction_arguments,
    report_arguments,
    review_arguments,
    use_own_data,
)
from dd.config.generation import (
    calibrate_arguments,
    check_source,
    executor,
    heat_reader,
    labeler,
    labeler_kind,
    labeler_run,
    masks_from,
    own_mask_set,
    prompts_sha256,
    quality,
    sweep_arguments,
    synthesis_settings,
    unit_size,
    worker_build,
)
from dd.config.identity import (
    CHANGES_NO_WEIGHT,
    OBSERVERS,
    RECORDED,
    processes,
    settings_identity,
    trainer_identity,
)
from dd.config.jobs import debugged, name_job
from dd.config.label_budget import (
    budget_plan,
    budget_run,
    budget_test,
    generation_seconds,
)
from dd.config.objects import (
    ALLOWED,
    USER_ERRORS,
    chosen_on,
    device,
    instantiate,
    plain,
    real_data,
    segmenter_of,
    taxonomy,
    trained_run,
)
from dd.config.overrides import check_overrides, quoted
from dd.config.training import (
    loggers,
    seed_everything,
    self_training,
    trainer,
    trainer_factory,
    training_record,
    training_sets,
)
from dd.config.tuning import (
    check_tuning,
    judged_labels,
    judging_set,
    one_device,
    search_space,
    study_content,
    study_identity,
    trial,
)

__all__ = [
    "ALLOWED",
    "CHANGES_NO_WEIGHT",
    "CONF",
    "OBSERVERS",
    "RECORDED",
    "USER_ERRORS",
    "adaptation",
    "budget_plan",
    "budget_run",
    "budget_test",
    "calibrate_arguments",
    "check_source",
    "check_overrides",
    "check_tuning",
    "compose",
    "composed",
    "debugged",
    "chosen_on",
    "deploy_arguments",
    "device",
    "executor",
    "heat_reader",
    "exit_code",
    "generation_seconds",
    "instantiate",
    "judged_labels",
    "labeler",
    "labeler_kind",
    "labeler_run",
    "judging_set",
    "loggers",
    "main",
    "masks_from",
    "name_job",
    "one_device",
    "own_mask_set",
    "page_arguments",
    "plain",
    "prediction_arguments",
    "processes",
    "prompts_sha256",
    "quality",
    "quoted",
    "real_data",
    "report_arguments",
    "review_arguments",
    "search_space",
    "seed_everything",
    "self_training",
    "segmenter_of",
    "key_values",
    "settings_identity",
    "study_content",
    "study_identity",
    "sweep_arguments",
    "taxonomy",
    "trained_run",
    "trainer",
    "trainer_factory",
    "trainer_identity",
    "training_record",
    "training_sets",
    "trial",
    "synthesis_settings",
    "unit_size",
    "use_own_data",
    "worker_build",
]
