"""Tables of cases as text: a command line, and below it, indented, what is expected of it."""


def cases(text):
    """Command lines with the lines that are indented below each, which may be none."""
    found = []
    for line in text.strip("\n").splitlines():
        if line.startswith(" "):
            found[-1][1].append(line.strip())
        elif line and not line.startswith("#"):
            found.append((line, []))
    return found


def assert_says(messages, expected):
    """Whether there are these messages; of each, pieces in order, between which is ` .. `."""
    assert len(messages) == len(expected), messages
    for message, pieces in zip(messages, expected, strict=True):
        rest = message
        for piece in pieces.split(" .. "):
            assert piece in rest, (piece, message)
            rest = rest.partition(piece)[2]
