"""A short Markdown table of a pytest run: `python tests/summary.py report.xml`."""

import sys
from collections import Counter, defaultdict
from xml.etree import ElementTree


def table(report: str) -> str:
    """Per test module: how many passed, failed, were skipped, and seconds."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        counts[case.get("classname", "")] += Counter({outcome: 1, "seconds": float(case.get("time", 0))})
    lines = ["| tests | passed | failed | skipped | seconds |", "|---|---|---|---|---|"]
    for module, count in sorted(counts.items()):
        failed = count["failure"] + count["error"]
        lines.append(f"| {module} | {count['passed']} | {failed} | {count['skipped']} | {count['seconds']:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1]))
