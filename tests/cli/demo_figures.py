"""Reads what `qjax demo` printed and fails where a figure is not the reference's: the gate runs it on the output of the install line.

    python tests/cli/demo_figures.py demo.log
"""

import re
import sys

# perplexity and how far off it may be; of transformers (float32) and torch
EXPECTED = {"float32": (47.051, 0.002), "int8 rtn": (47.057, 0.001), "int4 g128 rtn": (47.423, 0.001)}
# gptqmodel 7.7 reaches these
BETTER_THAN = {"int4 g128 gptq": 47.242, "int3 g128 gptq": 48.128}


BITS = {"float32": "32.00", "int8 rtn": "8.10", "int4 g128 rtn": "4.25", "int4 g128 gptq": "4.25", "int3 g128 gptq": "3.25"}
ROW = re.compile(r"^((?:float|int)\S*(?: \S+)*?) +(\d+\.\d{3}) +(?:(0\.\d+) +\S+% +)?(\d+\.\d\d) ", re.MULTILINE)


def wrong(text: str) -> list[str]:
    """What is not as it must be."""
    rows = {name: (float(value), float(kl or 0), bits) for name, value, kl, bits in ROW.findall(text)}
    nothing = 0.0, 9.0, "none"
    found = {name: rows.get(name, nothing) for name in BITS}
    off = [f"{name}: {found[name][0]} for {value}" for name, (value, by) in EXPECTED.items() if abs(found[name][0] - value) > by]
    worse = [f"{name}: {found[name][0]}, not below {value}" for name, value in BETTER_THAN.items() if not 47 < found[name][0] < value]
    bits = [f"{name}: {found[name][2]} bits a weight for {value}" for name, value in BITS.items() if found[name][2] != value]
    better, plain = "int4 g128 gptq", "int4 g128 rtn"
    kl = [] if found[better][1] < found[plain][1] else [f"KL of {better} is not below that of {plain}"]
    return off + worse + bits + kl


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        faults = wrong(file.read())
    sys.exit("\n".join(faults) or 0)
