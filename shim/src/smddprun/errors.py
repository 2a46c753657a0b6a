"""What smddprun refuses."""


class UsageError(Exception):
    """The command line, or what it needs, is wrong: the text says what was expected, given, and what to do."""

    def __init__(self, text: str, status: int = 2) -> None:
        super().__init__(text)
        self.status = status
