"""``driver.py <folder> <JSON of settings>``: one run of the stage synthesize on a fake generator, to be killed."""

import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import fake

from dd.executors import EXIT, Local, Shard
from dd.locks import Busy
from dd.stages.synthesize import synthesize
from dd.taxonomy import Taxonomy

PETS = Taxonomy("pets", ["cat", "dog", "cow"])


def main(folder, images=24, unit_size=2, executor=None, generator=None):
    chosen, generator = dict(executor or {}), generator or {}
    kind = Shard if "index" in chosen else Local
    try:
        done = synthesize(
            folder, fake.FakeGenerator(**generator), fake.prompts, PETS, images, 1, unit_size, "png",
            executor=kind(**chosen), build=partial(fake.build, **generator),
        )  # fmt: skip
    except Busy as error:
        print(error, file=sys.stderr)
        return EXIT["busy"]
    except OSError as error:
        print(error, file=sys.stderr)
        return EXIT["cannot write"]
    print(json.dumps(done))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], **json.loads(sys.argv[2])))
