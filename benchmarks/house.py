"""What a newcomer meets: the code's shape in numbers, beside what is aimed at.

    python -m benchmarks.house [--root .]

``statements``: ``ast.stmt`` without docstrings. ``complexity``: 1 + branches, loops, handlers,
boolean operators, conditional expressions and conditions of comprehensions, nested functions apart.
``arguments``: of a function, without self and cls; a kernel's, whose launch needs them, count too.
The last line is JSON.
"""

import argparse
import ast
import json
from collections.abc import Iterator
from pathlib import Path

import yaml

Function = ast.FunctionDef | ast.AsyncFunctionDef
MOST_ARGUMENTS, MOST_COMPLEXITY, LONGEST = 8, 15, 100
AIMS = {
    "files loose in dd/": "<= 3",
    "rooms": "a dozen",
    "statements in dd/": "<= 11500",
    "lines over 100 characters": "0",
    "# fmt: skip": "<= 10",
    "functions with more than 8 arguments": "<= 5",
    "functions of complexity over 15": "<= 10",
    "arguments of public functions typed, %": "100",
    "returns of public functions typed, %": "100",
    "guards of settings in dd/config and dd/stages": "few",
    "YAML files": "<= 60",
    "YAML keys": "",
}


def functions(tree: ast.AST, inside: bool = False) -> Iterator[tuple[Function, bool, bool]]:
    """(function, whether it is a method, whether it stands in another function)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield node, isinstance(tree, ast.ClassDef), inside
            yield from functions(node, True)
        else:
            yield from functions(node, inside)


def arguments(function: Function, method: bool) -> list[ast.arg]:
    given = function.args
    found = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    found += [a for a in (given.vararg, given.kwarg) if a is not None]
    static = any(
        isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list
    )
    return found[1:] if method and not static else found


def complexity(function: Function) -> int:
    total, todo = 1, list(ast.iter_child_nodes(function))
    while todo:
        node = todo.pop()
        if isinstance(node, Function | ast.Lambda):
            continue
        branches = ast.If | ast.For | ast.AsyncFor | ast.While | ast.ExceptHandler | ast.IfExp
        total += isinstance(node, branches | ast.match_case)
        total += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
        total += len(node.ifs) if isinstance(node, ast.comprehension) else 0
        todo += ast.iter_child_nodes(node)
    return total


def is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def is_guard(node: ast.AST) -> bool:
    """``if ...: raise ValueError(...)`` and nothing else."""
    if not isinstance(node, ast.If) or len(node.body) != 1 or node.orelse:
        return False
    raised = node.body[0]
    if not isinstance(raised, ast.Raise) or not isinstance(raised.exc, ast.Call):
        return False
    return isinstance(raised.exc.func, ast.Name) and raised.exc.func.id == "ValueError"


def keys(node: object) -> int:
    if isinstance(node, dict):
        return len(node) + sum(map(keys, node.values()))
    return sum(map(keys, node)) if isinstance(node, list) else 0


def measure(root: Path) -> dict[str, float]:
    sources = {p: p.read_text() for p in [*(root / "dd").rglob("*.py"), *root.glob("*.py")]}
    others = {p: p.read_text() for d in ("tests", "benchmarks") for p in (root / d).rglob("*.py")}
    trees = {path: ast.parse(text) for path, text in sources.items()}
    package = {p: t for p, t in trees.items() if (root / "dd") in p.parents}
    every = [f for tree in trees.values() for f in functions(tree)]
    public = [
        (f, method)
        for f, method, inside in every
        if not inside and (not f.name.startswith("_") or f.name.startswith("__"))
    ]
    given = [a for f, method in public for a in arguments(f, method)]
    text = [line for source in (sources | others).values() for line in source.splitlines()]
    wired = [t for p, t in package.items() if {"config", "stages"} & set(p.parts)]
    files = [yaml.safe_load(p.read_text()) for p in (root / "conf").rglob("*.yaml")]
    statements = (n for t in package.values() for n in ast.walk(t) if isinstance(n, ast.stmt))
    return {
        "files loose in dd/": len([*(root / "dd").glob("*.py")]),
        "rooms": len([*(root / "dd").glob("*/__init__.py")]),
        "statements in dd/": sum(not is_docstring(n) for n in statements),
        "lines over 100 characters": sum(len(line) > LONGEST for line in text),
        "# fmt: skip": sum(line.rstrip().endswith("# fmt: skip") for line in text),
        "functions with more than 8 arguments": sum(
            len(arguments(f, method)) > MOST_ARGUMENTS for f, method, _ in every
        ),
        "functions of complexity over 15": sum(
            complexity(f) > MOST_COMPLEXITY for f, _, _ in every
        ),
        "arguments of public functions typed, %": share(a.annotation for a in given),
        "returns of public functions typed, %": share(f.returns for f, _ in public),
        "guards of settings in dd/config and dd/stages": sum(
            is_guard(n) for t in wired for n in ast.walk(t)
        ),
        "YAML files": len(files),
        "YAML keys": sum(map(keys, files)),
    }


def share(annotations: Iterator[ast.expr | None]) -> float:
    found = [a is not None for a in annotations]
    return round(100 * sum(found) / len(found), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    measured = measure(parser.parse_args().root)
    width = max(map(len, measured))
    for name, value in measured.items():
        print(f"{name:<{width}}  {value:>8}  {AIMS[name]}")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
