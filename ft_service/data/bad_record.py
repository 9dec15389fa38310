"""Why one record cannot be used."""


class BadRecord(ValueError):
    """One record cannot be used. Carries the data gate's code; the caller adds the place."""

    def __init__(self, reason: str, code: str = "form.wrong-type") -> None:
        super().__init__(reason, code)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])


def check_unicode(text: str, name: str) -> None:
    """Raises `BadRecord` for half a character. JSON can escape one (``\\ud83d`` alone); no tokenizer accepts it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"{name} contains half a character, {text[error.start]!r}, at position {error.start}", "form.encoding"
        ) from None
