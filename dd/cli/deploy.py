"""``python -m dd deploy|page``: using a trained run."""

import contextlib
import sys
from argparse import Namespace
from typing import Any

# settings of each command that uses a run
RUN = {"run": None, "weights": "ema", "trusted": "false", "taxonomy": None}
DEPLOY = {**RUN, "output": None, "images": None, "data_root": "data"}
PAGE = {**RUN, "port": "8000"}


def run_options(commands: Any) -> None:
    for name, keys, text in (
        ("deploy", DEPLOY, "write a trained run as an ONNX file, compared with PyTorch on images"),
        ("page", PAGE, "a page on this machine that segments an image dropped on it"),
    ):
        parser = commands.add_parser(name, help=text, description=text)
        parser.add_argument(
            "settings", nargs="+", metavar="KEY=VALUE", help=f"{', '.join(keys)} (docs/deploy.md)"
        )


def _missing(error: ModuleNotFoundError, extra: str) -> ValueError:
    return ValueError(
        f'{error.name} is not installed; install what {extra} needs: pip install -e ".[{extra}]"'
    )


def deploy_run(options: Namespace) -> int:
    from dd import config  # here: only commands with a run need Lightning and Hydra

    chosen = config.key_values(options.settings, DEPLOY)
    try:
        from dd.stages.deploy import deploy
    except ModuleNotFoundError as error:
        raise _missing(error, "deploy") from None
    given = config.deploy_arguments(chosen)
    done = deploy(**given)
    print(
        f"{100 * done['agreement']:.4f} % of {done['pixels']} pixels of {done['images']} images "
        "are as PyTorch's in float32"
    )
    if bad := done["unreadable"]:
        said = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
        print(
            f"warning: {len(bad)} of {len(bad) + done['images']} images could not be read: {said}",
            file=sys.stderr,
        )
    if len(done["classes_seen"]) == 1:
        print(
            "warning: both see only one class in these images, which proves little; give others "
            "with images=...",
            file=sys.stderr,
        )
    print(f"{'kept' if done['kept'] else 'ready'}: {given['target']}")
    return 0


def show_page(options: Namespace) -> int:
    from dd import config

    chosen = config.key_values(options.settings, PAGE)
    try:
        from dd.deploy.page_server import serve
        from dd.stages.page import about, page
    except ModuleNotFoundError as error:
        raise _missing(error, "page") from None
    given, port, run = config.page_arguments(chosen)
    with contextlib.suppress(KeyboardInterrupt):  # the normal end
        serve(page(**given, about=about(str(chosen["run"]), run)), port)
    return 0
