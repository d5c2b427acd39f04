"""Seconds and memory of a large plan: made, frozen, opened, resumed; no image is generated.

    python benchmarks/plan.py [--samples 1000000]

Half of the samples have records (as they are written, without quality signals). The last line is
one JSON object.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from dd.prompts.prompt import make_prompt
from dd.store.provenance import write_atomic
from dd.store.samples import (
    append_records,
    make_plan,
    open_units,
    outcomes,
    plan_lines,
    plan_sha256,
    read_plan,
)
from dd.taxonomy import Taxonomy

UNIT = 32


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    number, seconds = parser.parse_args().samples, {}
    taxonomy = Taxonomy("pets", ["cat", "dog", "cow", "guinea pig"])
    prompts = [
        make_prompt(f"a photo of something on a table in a room, {i % 40_000}", ["cat", "dog"])
        for i in range(number)
    ]

    def timed(name, call):
        start = time.perf_counter()
        result = call()
        seconds[name] = round(time.perf_counter() - start, 2)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{name}: {seconds[name]} s, peak memory so far {peak:.2f} GiB")
        return result

    with tempfile.TemporaryDirectory() as folder:
        plan = timed("make", lambda: make_plan(prompts, taxonomy, 0, UNIT))
        timed("hash", lambda: plan_sha256(plan))
        timed("freeze", lambda: write_atomic(Path(folder) / "plan.jsonl", plan_lines(plan)))
        record = {"attempt": 0, "image_sha256": "0" * 64, "heat_sha256": "1" * 64, "seconds": 1.0}
        for start in range(0, number // 2, 10_000):
            append_records(
                folder,
                "0",
                [{"id": s.id, "unit": s.unit, **record} for s in plan[start : start + 10_000]],
            )
        plan = None
        plan = timed("open", lambda: read_plan(folder))
        found = timed("read records", lambda: outcomes(folder))
        todo = timed("find open units", lambda: open_units(plan, found))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        json.dumps(
            {
                "samples": number,
                "open_units": len(todo),
                "seconds": seconds,
                "peak_gib": round(memory, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
