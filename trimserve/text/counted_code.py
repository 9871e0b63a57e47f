"""The Python code of a chat template, with questions to its sandbox where jinja2's own code would ask nobody.

Import this module only where jinja2 is there.
"""

from collections.abc import Iterable

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame


class CountedCode(CodeGenerator):
    """Asks the environment of `trimserve.text.sandbox`: of blocks, comparisons, keys, slices, joins."""

    def blockvisit(self, nodes_: Iterable[nodes.Node], frame: Frame) -> None:
        block = list(nodes_)
        printed = (child for node in block if isinstance(node, nodes.Output) for child in node.nodes)
        literals = sum(len(child.data) for child in printed if isinstance(child, nodes.TemplateData))
        self.writeline(f"environment.enter({literals})")
        super().blockvisit(block, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        join = "markup_join" if frame.eval_ctx.autoescape else "str_join"
        if frame.eval_ctx.volatile:
            join = "(markup_join if context.eval_ctx.volatile else str_join)"
        self.write(f"{join}(environment.weigh_parts((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self.write("(")
        self._weighed(node.expr, frame)
        for op in node.ops:
            self.visit(op, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:
        word = {"in": "in", "notin": "not in"}.get(node.op)
        if word is None:
            signs = {"eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<="}
            self.write(f" {signs[node.op]} ")
            self._weighed(node.expr, frame)
        else:
            self.write(f" {word} ")
            self._weighed(node.expr, frame, "weigh_container")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self.write("environment.sliced(")
            super().visit_Getitem(node, frame)
            self.write(")")
        else:
            super().visit_Getitem(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("{")
        for item in node.items:
            self._weighed(item.key, frame)
            self.write(": ")
            self.visit(item.value, frame)
            self.write(", ")
        self.write("}")

    def _weighed(self, node: nodes.Expr, frame: Frame, how: str = "weigh") -> None:
        if _is_constant(node):
            self.visit(node, frame)
            return
        self.write(f"environment.{how}(")
        self.visit(node, frame)
        self.write(")")


def _is_constant(node: nodes.Node) -> bool:
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(isinstance(item, nodes.Const) for item in node.items)
    return isinstance(node, nodes.Const)
