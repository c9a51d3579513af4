"""Write ``docs/operations.md`` from the registry of derivative rules.

``python docs/generate_operations.py`` renews the page; with ``--check`` it only tells whether that is needed.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from dagh import Rule
from dagh._rewrites import REWRITES
from dagh._rules import registered

PAGE = Path(__file__).with_name("operations.md")

HEAD = """\
# Operations

<!-- Generated from the rule registry by docs/generate_operations.py; do not edit. -->

Every operation that PyTorch can differentiate twice is supported. The ones below have a derivative rule of
their own in closed form; the rest run on generic derivatives, `torch.func` on that node alone, which is exact
and slower. `print(H.plan)` names the operations of a model that did. `dagh ops` prints one line per
operation, and [adding an operation](howto/add_an_operation.md) shows how to register a rule.

Classes: a *linear* operation is linear in all its arguments jointly and adds nothing to the functional
Hessian; a *bilinear* one is linear in each argument separately; an *elementwise* one has a diagonal second
derivative; a *kinked* one is not differentiable everywhere, and has [choices at its kinks](howto/kinks.md);
*smooth* is everything else.

Names are those of PyTorch's ATen operators. A name without an overload (`aten.add`) covers every overload
that has no entry of its own. `[0]` is the first output of an operation with several.
"""

TAKEN_APART = """
## Operations taken apart

These are rewritten while the model is traced, into operations of the table above or into simpler ones.
"""


def first_sentence(rule: Rule) -> str:
    """The first line of the rule's docstring, as Markdown."""
    line = (inspect.getdoc(type(rule)) or "").partition("\n")[0]
    return line.replace("``", "`").replace("|", "\\|")


def rule_table() -> list[str]:
    """One row per kind of rule, with every operation that uses it."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, rule in registered().items():
        if not rule.closed_form:
            continue
        what = ". ".join(part.rstrip(".") for part in (first_sentence(rule), rule.note) if part)
        groups.setdefault((rule.derivative, rule.acts_per, what), []).append(name)
    lines = ["| derivative | acts per | rule | operations |", "| --- | --- | --- | --- |"]
    for (derivative, acts_per, what), names in sorted(groups.items()):
        lines.append(f"| {derivative} | {acts_per} | {what} | {', '.join(f'`{name}`' for name in names)} |")
    return lines


def render() -> str:
    """The whole page."""
    count = sum(rule.closed_form for rule in registered().values())
    rewritten = ", ".join(f"`{name}`" for name in sorted(REWRITES))
    return "\n".join([HEAD, f"## Rules ({count} entries)", "", *rule_table(), TAKEN_APART, rewritten, ""])


def main() -> int:
    page = render()
    if "--check" in sys.argv[1:]:
        fresh = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page
        print("up to date" if fresh else "operations.md is stale: run python docs/generate_operations.py")
        return 0 if fresh else 1
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
