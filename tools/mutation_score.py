"""How many seeded faults the tests detect: the mutation score of the core.

    python tools/mutation_score.py [--number 150] [--seed 0] [--only engine ...]

A mutant changes one place of one module: a comparison, an operator, a constant, a keyword argument
or a statement. The tests that belong to the module then run until the first failure. A mutant that
no test notices survives and is printed; some are equivalent to the original. Each mutant runs in a
forked process, so that torch is imported once; commands that the tests start see no mutant.
"""

import argparse
import ast
import copy
import os
import random
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision  # noqa: F401 (for the forked processes)

ROOT = Path(__file__).resolve().parent.parent

#: Modules that are mutated, and the tests that belong to each, besides the golden numbers.
TESTS = {
    "prompt": "test_prompt.py",
    "vision_transformer": "test_vision_transformer.py",
    "model/encoder": "model/test_encoder.py test_vision_transformer.py",
    "engine": "test_engine.py experiment/test_resume.py",
    "training/evaluation": "training/test_evaluation.py test_engine.py",
    "training/losses": "test_engine.py",
    "training/update": "training/test_update.py test_engine.py",
    "reports/metrics": "reports/test_metrics.py test_engine.py",
    "continual_datasets/samplers": "test_continual_dataloader.py continual_datasets/test_replay.py",
    "continual_datasets/replay": "continual_datasets/test_replay.py",
    "continual_datasets/scenarios": "continual_datasets/test_scenarios.py cli/test_configs.py",
    "continual_datasets/task_splits": "continual_datasets/test_task_splits.py "
    "continual_datasets/test_scenarios.py",
    "experiment/checkpoints": "experiment/test_checkpoints.py experiment/test_resume.py",
    "experiment/resume": "experiment/test_resume.py experiment/test_continuation.py",
}

SWAPPED: dict[Any, Any] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


class Mutant(NamedTuple):
    """A module with one node in the place of another; without nodes the module as it is."""

    module: str  # path without ending
    tree: ast.Module
    node: Any = None
    new: Any = None

    def __str__(self) -> str:
        old, new = (ast.unparse(node)[:70] for node in (self.node, self.new))
        return f"line {self.node.lineno}: {old}  ->  {new}"


def main() -> int:
    """Runs a sample of mutants; returns 1 if the tests fail without any."""
    parser = argparse.ArgumentParser(description="Mutation score of the core.")
    parser.add_argument("--number", type=int, default=150, help="mutants, shared by the modules")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--only", nargs="+", choices=TESTS, default=list(TESTS), help="modules")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trees = {module: ast.parse((ROOT / f"{module}.py").read_text()) for module in args.only}
    share, rng = -(-args.number // len(trees)), random.Random(args.seed)
    mutants = [m for module, tree in trees.items() for m in sample(module, tree, share, rng)]
    with ThreadPoolExecutor(2) as pool:
        if not all(pool.map(survives, [Mutant(*item) for item in trees.items()])):
            sys.exit("the tests fail without any mutant")
        alive = dict(zip(mutants, pool.map(survives, mutants), strict=True))
    for module in trees:
        own = [mutant for mutant in mutants if mutant.module == module]
        survived = [mutant for mutant in own if alive[mutant]]
        detected = len(own) - len(survived)
        print(f"{module}.py: {detected} of {len(own)} detected", *survived, sep="\n  ")
    detected = len(mutants) - sum(alive.values())
    print(f"mutation score: {detected} of {len(mutants)}, {detected / len(mutants):.1%}")
    return 0


def sample(module: str, tree: ast.Module, number: int, rng: random.Random) -> list[Mutant]:
    """So many mutants of a module, at most one a line."""
    places = list(changes(tree))
    by_line = {place[0].lineno: place for place in rng.sample(places, len(places))}
    chosen = rng.sample(list(by_line.values()), min(number, len(by_line)))
    return [Mutant(module, tree, *place) for place in chosen]


def changes(tree: ast.Module) -> Iterator[tuple[Any, Any]]:
    """Every node that may be changed, with what takes its place."""
    left_out = {id(part) for node in ast.walk(tree) for part in without_numbers(node)}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        new: Any = copy.deepcopy(node)
        match new:
            case ast.Compare(ops=[*_, last]) if type(last) in SWAPPED:
                new.ops[-1] = SWAPPED[type(last)]()
            case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in SWAPPED:
                new.op = SWAPPED[type(op)]()
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                new = operand
            case ast.Constant(value=bool(value)):
                new = ast.Constant(not value)
            case ast.Constant(value=int(value) | float(value)):
                new = ast.Constant(2 * value + 1)
            case ast.IfExp(body=body, orelse=orelse):
                new.body, new.orelse = orelse, body
            case ast.If(body=[ast.Raise()]):
                new.test = ast.Constant(False)
            case ast.AugAssign() | ast.Expr(value=ast.Call()):
                new = ast.Pass()
            case ast.Call(keywords=[_, *rest]) if not ast.unparse(new.func)[0].isupper():
                new.keywords = rest
            case _:
                continue
        yield node, new


def without_numbers(node: ast.AST) -> Iterator[ast.AST]:
    """Messages, docstrings, annotations, decorators and log lines of a node, with all inside."""
    parts = [getattr(node, name, None) for name in ("annotation", "returns")]
    parts += getattr(node, "decorator_list", [])
    match node:
        case ast.JoinedStr() | ast.Raise() | ast.Assert() | ast.Expr(value=ast.Constant()):
            parts.append(node)
        case ast.Call(func=func) if ast.unparse(func).startswith(("logg", "super")):
            parts.append(node)
    for part in filter(None, parts):
        yield from ast.walk(part)


def survives(mutant: Mutant, seconds: float = 240) -> bool:
    """Whether the tests of a module pass, in this time, with its mutant."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os._exit(run_tests(mutant))
    killer = threading.Timer(seconds, os.killpg, (child, 9))
    killer.start()
    _, status = os.waitpid(child, 0)
    killer.cancel()
    return status == 0


def run_tests(mutant: Mutant) -> int:
    """Runs the tests of a module with its mutant, in a forked process; returns pytest's code."""
    path, get_code = str(ROOT / f"{mutant.module}.py"), SourceFileLoader.get_code

    class Replace(ast.NodeTransformer):
        def visit(self, found: ast.AST) -> ast.AST:
            return mutant.new if found is mutant.node else self.generic_visit(found)

    tree: Any = ast.fix_missing_locations(Replace().visit(mutant.tree))
    code = compile(tree, path, "exec")

    def mutated(loader: SourceFileLoader, name: str) -> Any:
        return code if loader.path == path else get_code(loader, name)

    setattr(SourceFileLoader, "get_code", mutated)  # noqa: B010
    os.chdir(ROOT)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    tests = [*TESTS[mutant.module].split(), "end_to_end/test_golden.py"]
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{t}" for t in tests)]))


if __name__ == "__main__":
    sys.exit(main())
