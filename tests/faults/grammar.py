"""What the commands are tried with: every setting of the three scripts with values of every kind,
and every file of ours with content that is valid JSON and wrong, or with a flipped byte."""

import json
import re
from pathlib import Path

from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from dd import config
from dd.store.provenance import CHECKSUM, fingerprint
from dd.store.samples import record_line

RUN, SET = "outputs/shapes/synthetic/seed=0", "data/synthetic/shapes"
MAKE = ["generate.py", "experiment=shapes", "num_images=4", "unit_size=2", "diffusion.steps=2"]
TRAIN = [
    "train.py",
    "experiment=shapes_synthetic",
    "batch_size=2",
    "scale=64",
    "segmenter.base_channels=8",
    "trainer.precision=32-true",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "trainer.max_steps=2",
]
STUDY = [
    "train.py",
    "experiment=shapes_budget",
    *TRAIN[2:],
    "study.shots=[0,4]",
    "study.domains=[shapes]",
    "study.seeds=[0]",
    "study.arms=[finetune,real]",
    "study.learning_rates.synthetic=null",
    "study.learning_rates.finetune=null",
    "study.learning_rates.real=null",
    "study.choose.shots=4",
    "trainer.max_steps=2",
]
PHOTOS = "images=data/shapes/JPEGImages"
SWEEP = ["evaluate.py", "experiment=shapes", "stage=sweep", f"sweep.run={RUN}"]
SWEEP += ["sweep.threshold=[0.4]", "sweep.workers=1"]
FAINT = "+quality.rules.faint={action: absent, signal: spread, below_percentile: 5}"
DROP = "+quality.rules.missing={action: drop, signal: missing, above: 1}"
WORLD = [  # what makes the folder that every case gets a copy of
    [*MAKE, FAINT],
    [*MAKE, FAINT, "stage=filter", DROP],
    [*MAKE, "stage=label", "mask_set=power0", "masks=paper", "masks.power=0"],
    TRAIN,
    ["evaluate.py", f"run={RUN}"],
    ["evaluate.py", f"run={RUN}", "stage=predict", PHOTOS],
    ["evaluate.py", f"run={RUN}", "stage=review", PHOTOS, "review.number=3", "output=queue"],
    SWEEP,
    ["dd", "export", "mmseg", SET, "exported"],
    STUDY,
]
COMMANDS = {
    "make": [*MAKE, "name=more", "num_images=2"],
    "go on": [*MAKE, "stage=synthesize"],
    "label": [*MAKE, "stage=label", "mask_set=other", "masks=paper", "masks.power=1"],
    "filter": [*MAKE, "stage=filter", FAINT, DROP],
    "sweep": SWEEP,
    "chosen": [
        *MAKE,
        "stage=label",
        "mask_set=other",
        f"masks_from={SET}/sweeps/shapes_synthetic_seed=0.json",
    ],
    "train": [*TRAIN, "name=new"],
    "train again": TRAIN,
    "finetune": [*TRAIN, "experiment=shapes_finetune", f"init_from={RUN}", "shots=4", "name=tuned"],
    "evaluate": ["evaluate.py", f"run={RUN}"],
    "audit": ["evaluate.py", "stage=audit", f"run={RUN}"],
    "self_train": [*MAKE, "stage=label", f"labeler.run={RUN}"],
    "predict": ["evaluate.py", "stage=predict", f"run={RUN}", PHOTOS],
    "review": [
        "evaluate.py",
        "stage=review",
        f"run={RUN}",
        PHOTOS,
        "review.number=3",
        "output=queue",
    ],
    "report": ["evaluate.py", "stage=report", "report.runs=outputs", "name=shapes"],
    "report of a set": ["evaluate.py", "stage=report"],
    "study": STUDY,
    "verify": ["dd", "verify", SET],
    "export": ["dd", "export", "mmseg", SET, "elsewhere"],
    "runs": ["dd", "runs"],
    "merge": ["dd", "merge", SET, "--into", "merged"],
}
OF_A_SET = [
    "go on",
    "label",
    "filter",
    "sweep",
    "train",
    "audit",
    "self_train",
    "report of a set",
    "verify",
    "export",
    "merge",
]
OF_A_RUN = [
    "train again",
    "finetune",
    "evaluate",
    "audit",
    "self_train",
    "predict",
    "review",
    "report",
    "runs",
    "sweep",
]
FILES = {  # of ours, and who reads them
    f"{SET}/run.json": OF_A_SET,
    f"{SET}/plan.jsonl": OF_A_SET,
    f"{SET}/records/*.jsonl": OF_A_SET,
    f"{SET}/SegmentationClass/masks.json": OF_A_SET,
    f"{SET}/masks/power0/masks.json": ["report of a set"],
    f"{SET}/quality/*/*.json": ["filter", "train", "report of a set"],
    f"{SET}/sweeps/*.json": ["sweep", "chosen", "report of a set"],
    f"{RUN}/run.json": OF_A_RUN,
    f"{RUN}/settings.json": OF_A_RUN,
    f"{RUN}/eval/shapes/metrics.json": ["evaluate", "report", "runs"],
    f"{RUN}/predictions/*/*.json": ["predict"],
    f"{RUN}/predictions/*/*/*.jsonl": ["predict"],
    "outputs/shapes_budget/*.json": ["study", "report"],
    "queue/*.json": ["review"],
    "queue/*/*.jsonl": ["review"],
    "data/shapes/run.json": ["finetune", "evaluate", "predict"],
    "exported/export.json": ["export again"],
}
COMMANDS["export again"] = ["dd", "export", "mmseg", SET, "exported"]
BYTES = {  # files whose bytes decide a result
    f"{SET}/JPEGImages/*": ["train", "audit", "self_train", "export", "verify", "report of a set"],
    f"{SET}/heat/*": ["label", "sweep", "verify", "chosen"],
    f"{SET}/SegmentationClass/*.png": ["train", "audit", "verify", "export"],
    f"{SET}/ImageSets/Segmentation/*.txt": ["train", "audit", "verify", "export"],
    f"{RUN}/checkpoints/last.ckpt": ["train again", "evaluate", "predict", "finetune"],
}
JUNK = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    10**20,
    1.5,
    0.0,
    -0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    "..",
    "../heat",
    "/nowhere/x",
    "a\nb",
    "a\tb",
    "µ😀",
    "\ud800",
    "x\0y",
    "=1+1",
    "x" * 300,
    "y" * 100_000,
    [],
    [1],
    [[1]],
    [None],
    ["x"],
    {},
    {"a": 1},
    {"_target_": "os.system"},
    "${nope}",
    "${seed}",
    "${oc.env:HOME}",
    "???",
    "null",
    "all",
    "auto",
]
TYPED = [
    "null",
    "true",
    "false",
    "0",
    "1",
    "-1",
    "2",
    "1" + 20 * "0",
    "1.5",
    "-0.5",
    "nan",
    "inf",
    "1e999",
    "''",
    "x",
    "'1'",
    "..",
    "../heat",
    "/nowhere/x",
    "a b",
    "'a\tb'",
    "µ😀",
    "'\udc80'",
    "'=1+1'",
    "x" * 300,
    "[]",
    "[1]",
    "[[1]]",
    "[null]",
    "[x]",
    "{}",
    "{a: 1}",
    "{_target_: os.system}",
    "${nope}",
    "${seed}",
    "${name}",
    "???",
    "all",
    "auto",
    "cuda:9",
    "[a,b",
    "1,2",
]


def keys(node, prefix: str = "") -> list[str]:
    """Every key of a configuration, groups of keys among them."""
    found = []
    for name in node:
        found.append(f"{prefix}{name}")
        inner = node._get_node(name)
        if (
            isinstance(inner, DictConfig)
            and not inner._is_none()
            and not inner._is_missing()
            and not inner._is_interpolation()
        ):
            found += keys(inner, f"{prefix}{name}.")
    return found


def settings_of(command: str) -> list[str]:
    script, *overrides = COMMANDS[command]
    return keys(config.compose(script.removesuffix(".py"), [config.quoted(o) for o in overrides]))


@st.composite
def typed(draw):
    """(command, argument): a setting of one of the scripts with a value of some kind, added or
    taken away."""
    name = draw(st.sampled_from([n for n, c in COMMANDS.items() if c[0] != "dd"]))
    key = draw(st.sampled_from(settings_of(name)))
    how = draw(st.sampled_from(["", "", "", "", "+", "++", "~"]))
    value = draw(st.sampled_from(TYPED))
    return name, f"~{key}" if how == "~" else f"{how}{key}={value}"


def places(value, path=()) -> list[tuple]:
    """Where something stands in a JSON value."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(p for key, part in inner for p in places(part, (*path, key)))]


def changed(value, path: tuple, action: str, junk):
    """A copy of a JSON value with another content at one place."""
    if not path:
        return junk
    value = json.loads(json.dumps(value))
    *way, last = path
    node = value
    for key in way:
        node = node[key]
    if action == "remove":
        del node[last]
    else:
        node[last] = junk
    return value


@st.composite
def content(draw):
    """(command, pattern, change): ``change(bytes)`` of a file of ours, whose checksum is right
    again if ``sealed``."""
    pattern = draw(st.sampled_from(list(FILES)))
    name, sealed = draw(st.sampled_from(FILES[pattern])), draw(st.integers(0, 4)) > 0
    action, junk = (
        draw(st.sampled_from(["replace", "replace", "remove"])),
        draw(st.sampled_from(JUNK)),
    )
    where, line_share = (
        draw(st.floats(0, 1, exclude_max=True)),
        draw(st.floats(0, 1, exclude_max=True)),
    )

    def change(data: bytes) -> bytes:
        lines = data.decode().splitlines() if pattern.endswith(".jsonl") else [data.decode()]
        at = int(line_share * len(lines))
        value = json.loads(lines[at])
        ours = value if isinstance(value, dict) else {}
        checked = ours.pop(CHECKSUM, None) is not None, ours.pop("sum", None) is not None
        spots = places(value)
        value = changed(value, spots[int(where * len(spots))], action, junk)
        if sealed and isinstance(value, dict) and checked[1]:
            lines[at] = record_line(value).rstrip("\n")
        else:
            if checked[0] and isinstance(value, dict):
                value[CHECKSUM] = fingerprint(json.loads(json.dumps(value))) if sealed else "0" * 64
            lines[at] = json.dumps(value)
        return "\n".join(lines).encode() + b"\n"

    return name, pattern, change, sealed


@st.composite
def flipped(draw):
    """(command, pattern, change): one byte of a file is another, or the second half of it is
    gone."""
    pattern = draw(st.sampled_from(list(BYTES)))
    name = draw(st.sampled_from(BYTES[pattern]))
    where, bits, cut = (
        draw(st.floats(0, 1, exclude_max=True)),
        draw(st.integers(1, 255)),
        draw(st.integers(0, 4)) == 0,
    )

    def change(data: bytes) -> bytes:
        at = int(where * len(data))
        return data[:at] if cut else data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]

    return name, pattern, change


def recorded(folder: Path, key: str):
    """What the config.yaml of a training that was made by ``train`` says of a key."""
    return OmegaConf.select(
        OmegaConf.load(folder / "outputs/new/config.yaml"), re.sub(r"^\++", "", key)
    )
