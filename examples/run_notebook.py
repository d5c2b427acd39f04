"""Run the code cells of a notebook in order, in this process and the working folder, and keep what
they print and show in the notebook:

    python examples/run_notebook.py examples/quickstart.ipynb

Needs no Jupyter. A cell's last expression is shown as in a notebook: its picture, or its text.
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path


def run_cell(source, names):
    """(what a cell printed, the value of its last expression or None)."""
    tree, last = ast.parse(source), None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        value = eval(compile(last, "<cell>", "eval"), names) if last else None
    return printed.getvalue(), value


def outputs(printed, value):
    """What a cell did, in the notebook's format."""
    found = []
    if printed:
        found.append({"name": "stdout", "output_type": "stream", "text": printed.splitlines(True)})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(True)}
        if hasattr(value, "_repr_png_"):
            data["image/png"] = base64.b64encode(value._repr_png_()).decode("ascii")
        shown = {"data": data, "metadata": {}, "output_type": "execute_result"}
        found.append(shown)
    return found


def main(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        cell["outputs"] = outputs(*run_cell("".join(cell["source"]), names))
        cell["execution_count"] = number
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                output["execution_count"] = number
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
