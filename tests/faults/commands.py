"""``commands.py``: runs commands of this package, each in a fork of a process that has imported
everything. Lines of JSON come in ({"argv", "folder"}), lines of JSON go out ({"code", "seconds",
"mebibytes", "said"}). A command that takes more memory or time than it may is stopped."""

import json
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS, BYTES = 60, 3 << 30


def warm_up() -> None:
    """What every command imports, before the forks; nothing here starts a thread."""
    import dd.__main__
    import evaluate
    import generate
    import train

    assert all((dd.__main__, evaluate, generate, train))
    import dd.generators
    import dd.report
    import dd.segmenters.deeplabv3
    import dd.training.loggers


def child(argv: list[str], folder: str, output: str) -> int:
    """In the fork: the command with its output in a file; returns its exit code."""
    os.chdir(folder)
    file = os.open(output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(file, 1), os.dup2(file, 2)
    with open("/proc/self/statm") as sizes:
        now = int(sizes.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, now + BYTES))
    signal.alarm(SECONDS)
    script, *arguments = argv
    sys.argv = [str(ROOT / script), *arguments]
    try:
        if script == "dd":
            import dd.__main__

            return dd.__main__.main(arguments)
        runpy.run_path(str(ROOT / script), run_name="__main__")
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush(), sys.stderr.flush()


def run(argv: list[str], folder: str) -> dict:
    output, begin = f"{folder}.said", time.monotonic()
    process = os.fork()
    if process == 0:
        code = 98
        try:
            code = child(argv, folder, output)
        finally:
            os._exit(code)
    _, status, used = os.wait4(process, 0)
    said = Path(output).read_bytes().decode(errors="replace") if Path(output).exists() else ""
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - begin,
        "mebibytes": used.ru_maxrss >> 10,
        "said": said,
    }


def main() -> None:
    warm_up()
    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
