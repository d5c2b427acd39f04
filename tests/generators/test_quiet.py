import os
import subprocess
import sys
from pathlib import Path

ADAPTERS = (
    "dd.generators, dd.segmenters.deeplabv3, dd.segmenters.huggingface, "
    "dd.prompts.captioner, dd.data.quality, dd.deploy.onnx_model"
)


def test_no_library_speaks_while_it_is_imported():
    """Advice about packages that nothing here needs (image processors, telemetry) is not for
    those who run a command."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", "-c", f"import {ADAPTERS}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
