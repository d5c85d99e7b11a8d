"""Cases that ditfast has to survive: `python tests/fuzz.py` runs them. A file for each generator.

A generator is a function ``make_case(rng, kit) -> Case``, which may write files into the current folder, which is
empty.
"""
