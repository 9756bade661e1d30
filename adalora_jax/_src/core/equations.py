"""Einsum equations of an input and a weight: the roles of the weight's axes."""

from __future__ import annotations

from collections import Counter


def operands(equation: str) -> tuple[list[str], str]:
    """Return the labels of an equation's operands and of its output.

    >>> operands("...d, df -> ...f")
    (['...d', 'df'], '...f')
    """
    inputs, _, output = equation.replace(" ", "").partition("->")
    return inputs.split(","), output


def problem_of(equation: str) -> str:
    """Return why an equation does not determine the matrices of its weight; empty if it does.

    >>> problem_of("...d,df->...f"), problem_of("bd,df->b")
    ('', "the label 'f' of the weight is neither in the input nor in the output")
    """
    inputs, ys = operands(equation)
    if len(inputs) != 2 or not all(inputs) or not ys:
        return "it is not of the form 'input,weight->output'"
    xs, ws = inputs
    if "..." in ws:
        return "the weight has '...'"
    if ("..." in xs) != ("..." in ys):
        return "'...' is in only one of input and output"
    _, ins, outs = roles(xs, ws, ys)
    xs, ys = xs.replace("...", "", 1), ys.replace("...", "", 1)
    for name, labels in (("input", xs), ("weight", ws), ("output", ys)):
        if not all(label.isalpha() for label in labels):
            return f"the labels {labels!r} of the {name} are not letters"
        if repeated := [label for label, n in Counter(labels).items() if n > 1]:
            return f"the label {repeated[0]!r} is repeated in the {name}"
    for name, labels, other in (("input", xs, ws), ("weight", ws, xs)):
        if alone := [label for label in labels if label not in other + ys]:
            place = "weight" if name == "input" else "input"
            return (
                f"the label {alone[0]!r} of the {name} is neither in the {place} nor in the output"
            )
    if unknown := [label for label in ys if label not in xs + ws]:
        return f"the label {unknown[0]!r} of the output is in neither operand"
    if not ins:
        return "it sums over no label of the weight"
    return "" if outs else "no label of the output is the weight's alone"


def roles(xs: str, ws: str, ys: str) -> tuple[str, str, str]:
    """Return the weight's stack, input and output labels.

    A label in all three operands is a stack label. So are equal leading labels of weight and
    output that are not in the input: such a weight holds one matrix for each of several outputs.

    >>> roles("BSD", "CKDH", "CBSKH")
    ('C', 'D', 'KH')
    """
    stack = [a for a in ws if a in xs and a in ys]
    for w, y in zip(ws, ys):
        if w != y or w in xs:
            break
        stack.append(w)
    stack = "".join(a for a in ws if a in stack)
    ins = "".join(a for a in ws if a in xs and a not in ys)
    return stack, ins, "".join(a for a in ws if a not in stack and a not in ins)


def weight_axes(equation: str) -> tuple[tuple[int, ...], ...] | None:
    """Return the weight's stack, in and out axes; None if the equation is not a sum of x W.

    >>> weight_axes("ecd,edf->ecf")
    ((0,), (1,), (2,))
    """
    if problem_of(equation):
        return None
    (xs, ws), ys = operands(equation)
    return tuple(tuple(ws.index(a) for a in role) for role in roles(xs, ws, ys))
