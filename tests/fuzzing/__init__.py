"""Cases that ditfast has to survive: `python tests/fuzz.py` runs them. One file per generator.

A generator is a function ``make_case(rng, kit) -> Case``. It may write files into the current folder, which starts
empty.
"""
