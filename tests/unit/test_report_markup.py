"""Markdown and LaTeX tables, against texts written by hand."""

import pandas as pd

from servegrid.report.markup import as_latex, as_markdown

TABLE = pd.DataFrame({"a_b": ["5%", "x"], "2 × 3": ["–", "1"]})


def test_a_markdown_table() -> None:
    assert as_markdown(TABLE) == "| a_b | 2 × 3 |\n| --- | ---: |\n| 5% | – |\n| x | 1 |\n"


def test_a_latex_table_has_booktabs_rules_and_escapes_special_characters() -> None:
    assert as_latex(TABLE, "50% of a_b & more", "tab:x") == (
        "% Needs \\usepackage{booktabs}.\n"
        "\\begin{table}\n\\centering\n\\caption{50\\% of a\\_b \\& more}\n\\label{tab:x}\n"
        "\\begin{tabular}{lr}\n\\toprule\na\\_b & 2 x 3 \\\\\n\\midrule\n"
        "5\\% & -- \\\\\nx & 1 \\\\\n\\bottomrule\n\\end{tabular}\n\\end{table}\n"
    )


def test_a_latex_table_without_rows_has_only_its_head() -> None:
    assert as_latex(TABLE.head(0), "None", "tab:x").count("\\\\") == 1
