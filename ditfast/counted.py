"""Numbers with their nouns, in what commands print."""


def counted(number: int, one: str, many: str = "") -> str:
    """ "1 image" or "50,000 images"; ``many`` is the plural where it is not ``one`` with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
