"""``driver.py <folder> <JSON of settings>``: one run of the stage synthesize on a fake
generator, to be killed."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.faults import fake  # first: its light modules stand in for heavy ones

# isort: split
from benchmarks.synthesis import synthesize
from dd.execution import EXIT, Local, Ray, Shard, UnitsFailed
from dd.store.locks import Busy
from dd.taxonomy import Taxonomy


class QuickRay(Ray):
    """Its workers start without torch: the light modules of ``fake`` come before the work that
    they are sent."""

    def run(self, units, total, task, *rest):
        light = replace(task, draw=fake.Light(task.draw), build=fake.Light(task.build))
        return super().run(units, total, light, *rest)


PETS = Taxonomy("pets", ["cat", "dog", "cow"])


def main(folder, images=24, unit_size=2, executor=None, generator=None):
    chosen, generator = dict(executor or {}), dict(generator or {})
    generator |= {"trap": Path(generator["trap"])} if "trap" in generator else {}
    kind = {"ray": QuickRay, "shard": Shard, "local": Local}[
        chosen.pop("kind", "shard" if "index" in chosen else "local")
    ]
    try:
        done = synthesize(
            folder,
            fake.FakeGenerator(**generator),
            fake.prompts,
            PETS,
            images,
            1,
            unit_size,
            "png",
            executor=kind(**chosen),
            build=partial(fake.build, **generator),
        )
    except Busy as error:
        print(error, file=sys.stderr)
        return EXIT["busy"]
    except UnitsFailed as error:
        print(error, file=sys.stderr)
        return EXIT["units failed"]
    except OSError as error:
        print(error, file=sys.stderr)
        return EXIT["cannot write"]
    print(json.dumps(done))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], **json.loads(sys.argv[2])))
