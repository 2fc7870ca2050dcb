"""A study in one file that others can check: packed, verified and opened again.

`pack` writes what `verify` reads; `open` makes a folder of it in which the study goes on. No code
that a bundle holds is run here. docs/bundles.md says what is in one and what each check proves.
"""
