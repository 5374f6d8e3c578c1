"""The README's table of methods, made from the catalogue.

python examples/readme_tables.py           writes it into README.md
python examples/readme_tables.py --check   exit 1 if README.md does not hold the present table
"""

import sys
from pathlib import Path

from merging.method import methods

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- methods: made by examples/readme_tables.py -->", "<!-- end of methods -->"


def link(paper: str) -> str:
    if paper.startswith("arXiv:"):
        return f"[{paper.removeprefix('arXiv:')}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"
    if paper.startswith("doi:"):
        return f"[doi](https://doi.org/{paper.removeprefix('doi:')})"
    return f"[source]({paper})" if paper.startswith("http") else paper


def table() -> str:
    lines = [
        "| method | what it does | role | paper | needs | passes | statistics | cost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, method in methods().items():
        role = f"{method.role}, on weights" if method.space == "weight" else method.role
        needs = {"nothing": "models", "statistics": "models and statistics", "training": "models and data"}[method.data]
        cells = (
            f"`{name}`",
            method.summary,
            role,
            link(method.paper),
            needs,
            method.passes,
            method.statistics,
            method.cost,
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    text = README.read_text("utf-8")
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    made = f"{head}{START}\n{table()}\n{END}{tail}"
    if "--check" in sys.argv:
        if made != text:
            sys.exit("README.md does not hold the present table of methods; run python examples/readme_tables.py")
    else:
        README.write_text(made, "utf-8")


if __name__ == "__main__":
    main()
