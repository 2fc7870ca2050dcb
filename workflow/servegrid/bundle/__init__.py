"""A study in one file that others can check.

`pack` makes a bundle, `verify` checks it, `unpack` turns it into a folder in which the study
continues. None of them runs code from a bundle. docs/bundles.md says what a bundle contains and
what each check proves.
"""
