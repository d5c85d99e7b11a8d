"""Which class has which label."""

SHOWN = 10  # classes by name in a line, and the last


def print_classes(source) -> None:
    """One line with the label and name of each class, the first few and the last of many; none if each is its label.

    Folders are sorted by name, so that the class in folder 10 has the label 2.
    """
    pairs = [f"{label} {name}" for label, name in enumerate(source.classes)]
    if all(name == str(label) for label, name in enumerate(source.classes)):
        return
    if len(pairs) > SHOWN + 1:
        pairs[SHOWN:-1] = ["…"]
    print(f"classes: {', '.join(pairs)}")
