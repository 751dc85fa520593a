"""List comparisons in the text of lessons that stand near no claim, to be read: python tests/prose.py [02 ...]

A comparison in the text is a sentence that a number may contradict one day. It belongs into `lesson.claim(sentence,
condition)`; what is left here is to be read beside the output of its cells.
"""

import re
import sys
from pathlib import Path

import jupytext

WORDS = re.compile(
    r"\b(beats?|better|worse|best|worst|most|least|mostly|hardly|level with|equals?|same|more than|less than|fewer|"
    r"higher|lower|larger|smaller|faster|slower|wins?|loses?|gains?|helps?|hurts?|never|always|nearly|almost|twice|half|"
    r"as good as|as much as|\d+(?:\.\d+)? ?%|\d+(?:\.\d+)? points?)\b",
    re.IGNORECASE,
)
NEAR = 1  # cells before or after that may hold the claim


def comparisons(source: Path) -> list[tuple[int, str, str]]:
    """(cell, words found, sentence) of each sentence that compares, and has no claim in the code cells around it."""
    cells, found = jupytext.read(source).cells, []
    for place, cell in enumerate(cells):
        around = cells[max(0, place - NEAR) : place + NEAR + 1]
        if cell.cell_type != "markdown" or any("lesson.claim(" in other.source for other in around):
            continue
        text = re.sub(r"<details>.*?</details>|```.*?```|\$\$.*?\$\$|^#+ [^\n]*$", "", cell.source, flags=re.S | re.M)
        for sentence in re.split(r"(?<=[.:?!])\s+", " ".join(text.split())):
            if words := sorted({match[0].lower() for match in WORDS.finditer(sentence)}):
                found.append((place, ", ".join(words), sentence))
    return found


if __name__ == "__main__":
    for source in sorted((Path(__file__).parents[1] / "notebooks" / "src").glob("[0-9][0-9]_*.py")):
        if len(sys.argv) > 1 and source.stem[:2] not in sys.argv[1:]:
            continue
        lines = comparisons(source)
        print(f"\n{source.stem}: {len(lines)} sentences")
        for place, words, sentence in lines:
            print(f"  [{place}] {words}: {sentence[:160]}")
