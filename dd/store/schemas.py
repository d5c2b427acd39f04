"""What readers rely on in the files that we write: one schema for each, in the form of
:func:`dd.store.provenance.fault`. Each field that a reader uses is listed here; files may hold
others."""

from typing import Any

NUMBER = (float, None)
CLASSES = {"name": str, "names": [str]}
# chosen_on: dd.evaluation.supervision
CHOSEN = ([{"what": str, "data": str, "labels": (int, None), "seed?": (int, None)}], None)

RUN: dict[str, Any] = {  # run.json of a synthetic data set, for readers that need its classes
    "identity": {
        "taxonomy": CLASSES,
        "generator?": dict,
        "plan_sha256?": str,
        "image_format?": str,
    },
    "terms?": ({"licence?": (str, None), "link?": (str, None)}, None),
    "versions?": dict,
    "command?": str,
    "git_commit?": str,
    "chosen_on?": CHOSEN,
}

READ = {"identity": {"generator": dict}, "chosen_on?": CHOSEN}  # run.json of any set with heat

DESCRIBED_RUN = {  # for readers that describe how it was made
    **RUN,
    "identity": {**RUN["identity"], "generator": dict},
}

WHOLE_RUN = {  # for readers that use or resume all of it
    **RUN,
    "identity": {"taxonomy": CLASSES, "generator": dict, "plan_sha256": str, "image_format": str},
}

MASKS: dict[str, Any] = {  # masks.json of a mask set, by any labeler
    "identity": {
        "settings?": {"power?": int, "source?": str},
        "heat?": str,
        "reading?": str,
        "images?": str,
        "absent?": {"rules": {"*": dict}, "classes": str},
        "calibration?": dict,
        "teacher?": dict,
        "labeler?": {
            "name": str,
            "supervision": str,
            "sets?": [{"set": str, "identity": dict, "masks": str}],
        },
    },
    "pixels?": {"*": int},
    "sha256?": {"*": str},
    "absent?": {"*": [str]},
    "chosen_on?": CHOSEN,
}
DRAWN = {
    "identity": {"settings": {"power?": int, "source": str}, "reading?": str}
}  # of a mask set read from attention
WHOLE_MASKS = {**MASKS, "sha256": {"*": str}}
# for a training: without the labels that chose the masks, their supervision class is unknown
JUDGED_MASKS = {**MASKS, "chosen_on": CHOSEN}

SIGNALS = {  # of the records of a synthetic set, and of those that the stage filter writes
    "heat?": {"*": {"*": [[NUMBER]]}},
    "clip?": {"by?": str, "prompt?": NUMBER, "classes?": [NUMBER]},
}
RECORD = {  # a line of records/*.jsonl: of generation, self-training, predictions, reviews
    "id": str,
    "unit?": int,
    "attempt?": int,
    "failed?": bool,
    "error?": str,
    "seconds?": float,
    "faults?": [str],
    "image_sha256?": str,
    "heat_sha256?": str,
    "signals?": SIGNALS,
    "sha256?": str,
    "source?": str,
    "file?": str,
    "look?": str,
    "mask?": str,
    "overlay?": str,
    "width?": int,
    "height?": int,
    "pixels?": ({"*": int}, [int]),
    "entropy?": float,
    "margin?": float,
}

TRAINED = {  # run.json of a trained segmenter
    "segmenter": {"_target_": str},
    "taxonomy": CLASSES,
    "supervision": str,
    "scale": int,
    "trained_on": {"source": str},
    "seconds?": float,
    "steps?": int,
    "bf16?": bool,
    "chosen_on?": CHOSEN,
}

NAMED = {"taxonomy": CLASSES}  # of run.json, for readers that compare classes
# what a training resumes or starts from
STARTED = {"trained_on": {"source": str}, "supervision": str, "chosen_on?": CHOSEN}
# for reports
LISTED = {**STARTED, "seconds": float, "memory_bytes?": (int, None), "hardware?": str}

DATASET = {  # dataset.json of a prepared data set
    "images": [str],
    "parts?": dict,
    "taxonomy?": {"name?": str, "names": ([str], dict)},
}

PARTS = {**DATASET, "parts": {"*": {"notes": [str]}}}

GROUPED = {  # and who wants to know whether its splits keep groups together
    "parts?": {"*": {"groups?": {"by": str, "noun": str, "number": int, "splits": {"*": int}}}}
}

IDENTIFIED = {"identity": dict}  # settings.json, study.json, review.json, ...
# filter.json of a list that the stage filter wrote
FILTERED = {"identity": {"ids": str}, "chosen_on?": CHOSEN}
WHOLE_FILTER = {  # for the stage itself
    **FILTERED,
    "samples": int,
    "kept": int,
    "rules": {"*": {"samples": int}},
    "classes": {"*": {"kept": int, "samples": int}},
}
SWEPT = {  # sweeps/<name>.json
    "sweep": {
        "identity?": dict,
        "against": str,
        "table": [
            {
                "chain?": str,
                "power?": int,
                "threshold?": float,
                "band?": float,
                "source": str,
                "miou": float,
                "miou_certain": NUMBER,
                "uncertain": float,
            }
        ],
        "chains?": {"*": {"miou": float, "less_first?": [NUMBER]}},
    },
}
EXPORTED = {"identity": dict, "files": {"*": int}}  # export.json
SCORED = {"data": str, "split": str, "miou": float}  # metrics.json, for lists of runs
SECONDS = {"seconds": float}  # seconds.json of a training in parts

BOUNDS = {"low": NUMBER, "high": NUMBER}
PRICE = {"median": BOUNDS, "range": BOUNDS}
# {arm: {number of real images: {domain: one value of each run}}}
AT_SHOTS = {"*": {"*": {"*": [NUMBER]}}}
SKIPPED = {
    "shown": bool,
    "median": BOUNDS,
    "interval": (BOUNDS, None),
    "runs": [BOUNDS],
    "falls_again": int,
}
STUDY = {  # budget.json, for reports
    "arms": AT_SHOTS,
    "labels?": {"*": str},
    "domains?": ({"*": (int, None)}, None),
    "seeds?": ([int], None),
    "draws?": (list, None),
    "failed?": (list, None),
    "runs?": ([{"domain": str, "num_images?": (int, None)}], None),
    "learning_rates?": ({"*": {"by_shots?": {"*": dict}}}, None),
    "cost?": {
        "prices?": ({"minutes_per_image": float, "per_hour": float, "per_gpu_hour": float}, None),
        "seconds?": AT_SHOTS,
        "labels?": {"*": {"*": {"*": int}}},
        "targets?": {
            "*": [{"target": float, "why": str, "arms": {"*": {"images": PRICE, "price": PRICE}}}]
        },
    },
    "differences?": [
        {
            "arm": str,
            "k": int,
            "against": str,
            "against_k": int,
            "domain": str,
            "value": float,
            **BOUNDS,
            "p": NUMBER,
            "p_holm": NUMBER,
            "seeds": int,
            "images": (int, None),
        }
    ],
    "skipped?": ({"*": {"*": {"*": {"*": SKIPPED}}}}, None),
}
