"""What goes through calls and loops as it came: modules with state hand their parameters back from every call."""

from __future__ import annotations

from typing import Any

from qjax.program import compat


def handed_back(jaxpr: Any) -> dict[int, int]:
    """Returns which results of a program are inputs of it, unchanged: {result: input}. Calls and loops inside are seen through."""
    body, _ = compat.parts(jaxpr)
    origin = {var: i for i, var in enumerate(body.invars)}
    for eqn in body.eqns:
        for result, operand in passed_on(eqn).items():
            atom = eqn.invars[operand]
            if not isinstance(atom, compat.Literal) and atom in origin:
                origin[eqn.outvars[result]] = origin[atom]
    results = enumerate(body.outvars)
    return {i: origin[atom] for i, atom in results if not isinstance(atom, compat.Literal) and atom in origin}


def passed_on(eqn: Any) -> dict[int, int]:
    """Returns which results of a call or scan are operands of it, unchanged: {result: operand}."""
    name = eqn.primitive.name
    if name in compat.INLINE or name in compat.REMAT:
        return handed_back(eqn.params[compat.CALLS[name]])
    if name != "scan":
        return {}
    consts, carry = compat.scan_counts(eqn)
    found = handed_back(eqn.params["jaxpr"])
    # A carry must come back in its own place; what a scan slices and stacks again is what it was.
    return {out: at for out, at in found.items() if (at == consts + out if out < carry else at >= consts + carry)}


def invariant_carries(jaxpr: Any, n_consts: int, n_carry: int) -> frozenset[int]:
    """Returns which carries of a loop body come back unchanged."""
    found = handed_back(jaxpr)
    return frozenset(i for i in range(n_carry) if found.get(i) == n_consts + i)
