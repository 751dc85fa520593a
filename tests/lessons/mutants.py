"""Mutants of a solution: the same code with one small fault, made by rules, as students and typists make them.

A check is as strong as the faults that it notices. Each rule changes one place of the syntax tree; mutants that do what
the solution does (equivalent ones) are listed in EQUIVALENT of `test_mutants`, each with its reason.
"""

import ast
import copy
import itertools
import re
from collections.abc import Iterator

SWAPPED = {
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,), ast.MatMult: (),
    ast.FloorDiv: (ast.Mult,), ast.Pow: (ast.Mult,), ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,),
}  # fmt: skip
COMPARED = {
    ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt,), ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt,),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,),
}  # fmt: skip
RENAMED = {
    "sum": ("mean",), "mean": ("sum",), "amin": ("amax",), "amax": ("amin",), "min": ("max",), "max": ("min",),
    "minimum": ("maximum",), "maximum": ("minimum",), "argmax": ("argmin",), "argmin": ("argmax",),
    "square": ("abs",), "abs": ("square",), "any": ("all",), "all": ("any",), "softplus": ("relu",),
    "train": ("eval",), "zeros": ("ones",), "ones": ("zeros",),
}  # fmt: skip
CHOICES = {"none": ("mean", "sum"), "l1": ("l2",), "l2": ("l1",), "cosine": ("l1",)}
SYMMETRIC = ("minimum", "maximum", "min", "max", "cosine_similarity")
# Methods of no argument (or of axes only) that a hurried student leaves out.
LEFT_OUT = ("relu", "abs", "detach", "softmax", "flip", "cumsum", "normalize", "eval", "zero_grad", "sqrt", "item")


class _Change(ast.NodeTransformer):
    """Puts `new` in the place of the node that is number `place` in the order of `ast.walk`."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        """The tree, with the new node in place of the old one."""
        return self.new if node is self.old else self.generic_visit(node)


def mutants(code: str, solution: str) -> Iterator[tuple[str, str]]:
    """What was changed, and the changed code; no two are alike, and none is the code itself.

    Args:
        code: of the whole cell.
        solution: those of its lines that a student writes; what is given is not changed.
    """
    own = {line.strip() for line in solution.splitlines()}
    lines = code.splitlines()
    tree, seen = ast.parse(code), {ast.unparse(ast.parse(code))}
    for number, node in enumerate(ast.walk(tree)):
        if lines[getattr(node, "lineno", 1) - 1].strip() not in own:
            continue
        for what, new in _changes(node):
            other = copy.deepcopy(tree)
            old = list(ast.walk(other))[number]
            changed = ast.unparse(ast.fix_missing_locations(_Change(old, new).visit(other)))
            if changed not in seen:
                seen.add(changed)
                yield f"line {getattr(node, 'lineno', 0)}: {what}", changed


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in the place of a node."""
    text = ast.unparse(node) if isinstance(node, ast.expr | ast.stmt) else ""
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            for other in SWAPPED.get(type(op), ()):
                new = ast.BinOp(left, other(), right)
                yield f"{text} -> {ast.unparse(new)}", new
            if isinstance(op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.BitAnd):
                yield f"{text} -> {ast.unparse(left)}", left
            if isinstance(op, ast.Add | ast.BitAnd):
                yield f"{text} -> {ast.unparse(right)}", right
            if isinstance(op, ast.Sub | ast.Div):
                new = ast.BinOp(right, op, left)
                yield f"{text} -> {ast.unparse(new)}", new
        case ast.Compare(left=left, ops=[op], comparators=right):
            for other in COMPARED.get(type(op), ()):
                new = ast.Compare(left, [other()], right)
                yield f"{text} -> {ast.unparse(new)}", new
        case ast.UnaryOp(op=ast.USub() | ast.Invert() | ast.Not(), operand=operand):
            yield f"{text} -> {ast.unparse(operand)}", operand
        case ast.Constant(value=str(value)) if re.fullmatch(r"[a-z,]+->[a-z]+", value):
            yield from (
                (f"{value} -> {other}", ast.Constant(other)) for other in _equations(*value.partition("->")[::2])
            )
        case ast.Constant(value=str(value)):
            yield from ((f"{value} -> {other}", ast.Constant(other)) for other in CHOICES.get(value, ()))
        case ast.Constant(value=bool(value)):
            yield f"{value} -> {not value}", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            for other in (value + 1, value - 1):
                yield f"{value} -> {other}", ast.Constant(other)
        case ast.Constant(value=float(value)):
            yield f"{value} -> {2 * value or 1.0}", ast.Constant(2 * value or 1.0)
        case ast.Call(func=function, args=arguments, keywords=keywords):
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            owner = getattr(function, "value", None)
            library = isinstance(owner, ast.Name) and owner.id in ("F", "torch", "np", "nn", "ndimage")
            for other in RENAMED.get(name, ()):
                renamed = ast.Attribute(owner, other, ast.Load()) if owner is not None else ast.Name(other, ast.Load())
                yield f"{name} -> {other}", ast.Call(renamed, arguments, keywords)
            if name in LEFT_OUT and (inner := arguments[0] if library and arguments else owner) is not None:
                if not isinstance(inner, ast.Name) or not library:
                    yield f"without {name}", inner
            if (
                len(arguments) == 2
                and name not in SYMMETRIC
                and not any(isinstance(a, ast.Constant) for a in arguments)
            ):
                yield f"{text}: arguments exchanged", ast.Call(function, arguments[::-1], keywords)
            for number, keyword in enumerate(keywords):
                kept = [*keywords[:number], *keywords[number + 1 :]]
                yield f"{name} without {keyword.arg}", ast.Call(function, arguments, kept)
        case ast.Attribute(value=value, attr="T" | "mT"):
            yield f"without .{node.attr}", value
        case ast.IfExp(test=test, body=body, orelse=other):
            yield "branches exchanged", ast.IfExp(test, other, body)
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Tuple | ast.Dict):
            for form in ("-({})", "2 * ({})", "({}) + 0.01"):
                new = form.format(ast.unparse(value))
                yield f"return {new}", ast.Return(ast.parse(new, mode="eval").body)
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield f"without `{text}`", ast.Pass()


def _equations(operands: str, result: str) -> Iterator[str]:
    """Equations of einsum with two letters exchanged, first in the result, then in an operand."""
    for pair in itertools.combinations(result, 2):
        yield f"{operands}->{result.translate(str.maketrans(''.join(pair), ''.join(pair[::-1])))}"
    first, _, rest = operands.partition(",")
    for pair in itertools.combinations(first, 2):
        yield f"{first.translate(str.maketrans(''.join(pair), ''.join(pair[::-1])))},{rest}->{result}"
