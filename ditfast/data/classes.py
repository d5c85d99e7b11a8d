"""The mapping of labels to classes, for users to check."""

from ditfast.data.protocol import Source

SHOWN = 10  # classes listed before the ellipsis


def print_classes(source: Source) -> None:
    """Print label and name of each class on one line (of many: the first few and the last), unless they are equal.

    Folders are sorted by name as strings, so the class in folder 10 comes before that in folder 2.
    """
    pairs = [f"{label} {name}" for label, name in enumerate(source.classes)]
    if all(name == str(label) for label, name in enumerate(source.classes)):
        return
    if len(pairs) > SHOWN + 1:
        pairs[SHOWN:-1] = ["…"]
    print(f"classes: {', '.join(pairs)}")
