"""Reads what `qjax demo` printed and fails where a figure is not the reference's: the gate runs it on the output of the install line.

    python tests/cli/demo_figures.py demo.log
"""

import re
import sys

# perplexity and how far off it may be; of transformers (float32) and torch
EXPECTED = {"float32": (47.051, 0.002), "int8 rtn": (47.057, 0.001), "int4 g128 rtn": (47.423, 0.001)}
# gptqmodel 7.7 reaches these
BETTER_THAN = {"int4 g128 gptq": 47.242, "int3 g128 gptq": 48.128}


def perplexities(text: str) -> dict[str, float]:
    """By row of the table."""
    return {name: float(value) for name, value in re.findall(r"^((?:float|int)\S*(?: \S+)*?) +(\d+\.\d{3})\b", text, re.MULTILINE)}


def wrong(text: str) -> list[str]:
    """What is not as it must be."""
    found = perplexities(text)
    off = [f"{name}: {found.get(name)} for {value}" for name, (value, by) in EXPECTED.items() if abs(found.get(name, 0) - value) > by]
    worse = [f"{name}: {found.get(name)}, not below {value}" for name, value in BETTER_THAN.items() if not 47 < found.get(name, 99) < value]
    return off + worse


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        faults = wrong(file.read())
    sys.exit("\n".join(faults) or 0)
