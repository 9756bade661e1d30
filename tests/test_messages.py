"""Errors and warnings have one form: "`name=value`: problem; way out."."""

from __future__ import annotations

import ast
import pathlib
import re

import adalora_jax

_ROOT = pathlib.Path(adalora_jax.__file__).parent
_FORM = re.compile(r"`[^`]+`: [^\n]+; [^\n]+\.")


def _text(node: ast.expr) -> str:
    """Return a message with <> for each value that is inserted, or for all of it."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(part.value if isinstance(part, ast.Constant) else "<>" for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
    return "<>"


def _messages():
    for file in sorted(_ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = ast.unparse(node.func)
            if name in ("ValueError", "TypeError", "FileNotFoundError", "warnings.warn"):
                yield f"{file.relative_to(_ROOT)}:{node.lineno}", _text(node.args[0])


def test_messages_have_the_form_subject_problem_way_out():
    # A message that ends in another error's message has its way out from there.
    wrong = [
        f"{place}: {text}"
        for place, text in _messages()
        if text != "<>" and not _FORM.fullmatch(text) and not re.fullmatch(r"`[^`]+`: <>", text)
    ]
    assert not wrong, "\n".join(wrong)
