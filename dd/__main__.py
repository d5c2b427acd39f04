"""``python -m dd prepare shapes``: commands that need no configuration."""

import argparse
import sys

from dd.stages.prepare import prepare_shapes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dd", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="write a data set to disk in PASCAL VOC layout")
    prepare.add_argument("data", choices=["shapes"], help="shapes: both domains of the embedded world")
    prepare.add_argument("--root", default="data", help="folder to write to (default: data)")
    options = parser.parse_args(arguments)
    try:
        for folder in prepare_shapes(options.root):
            print(f"ready: {folder}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
