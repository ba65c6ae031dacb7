"""What can be read in the assembly of a kernel before it ever ran: whether a product's registers are left alone while it is under way."""

import re

_WRITES = re.compile(r"^(?:@!?U?P\d+ )?(\S+)\s+(?:PT, )?R(\d+)(?:\.\w+)?,")
_NO_WRITES = ("ST", "RED", "BAR", "SYNCS")


def instructions(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions of a kernel in the order in which they lie, and where its loops begin and end.

    Args:
      text: SASS, as `nvdisasm` prints it.
    """
    code: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            code.append(found[1])
            back = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", found[1])
            if back and back[1] in labels:
                loops.append((labels[back[1]], len(code)))
    return code, loops


def written_under_way(text: str) -> tuple[int, list[str]]:
    """Instructions that write a register from which the tensor cores may still read an operand.

    A product (HGMMA, IGMMA, QGMMA) reads operand A out of registers after it was issued, until a wait says that its group is done. That no
    other value is put there meanwhile is up to the assembler; across a loop it was seen to fail. Every loop that multiplies is read
    twice over, so that its end meets its beginning.

    Args:
      text: SASS, as `nvdisasm` prints it.

    Returns:
      How many products with an operand in registers were read, and the offending instructions.
    """
    code, loops = instructions(text)
    products, offending = 0, []
    for start, end in loops:
        if any("GMMA" in each for each in code[start:end]):
            more, wrong = _read(code[start:end] * 2)
            products, offending = products + more, offending + wrong
    return products, offending


def _read(code: list[str]) -> tuple[int, list[str]]:
    products, offending = 0, []
    current: set[int] = set()
    groups: list[set[int]] = []
    for instruction in code:
        if "GMMA" in instruction:
            if operand := re.match(r"\S+ R\d+, R(\d+), gdesc", instruction):
                current |= set(range(int(operand[1]), int(operand[1]) + 4))
                products += 1
            if "gsb0" in instruction:
                groups, current = [*groups, current], set()
        elif wait := re.search(r"DEPBAR\.LE gsb0, (0x[0-9a-f]+)", instruction):
            groups = groups[max(0, len(groups) - int(wait[1], 16)) :]
        elif (written := _WRITES.match(instruction)) and not written[1].startswith(_NO_WRITES):
            wide = 4 if written[1].endswith((".128", ".4")) else 2 if ".64" in written[1] or "WIDE" in written[1] else 1
            if current.union(*groups) & set(range(int(written[2]), int(written[2]) + wide)):
                offending.append(instruction)
    return products, offending
