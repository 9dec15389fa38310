"""Recognises text in another encoding than UTF-8, and states the command that converts it."""

import codecs
import re
import shlex
from itertools import islice
from pathlib import Path

from charset_normalizer import from_bytes

from ft_service.data.files.shard import Fault

_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""Byte order mark -> encoding, the longer marks first."""
_CANDIDATES = {
    "cp932": "CP932",
    "euc_jp": "EUC-JP",
    "gb18030": "GB18030",
    "big5": "BIG5",
    "cp949": "CP949",
    "cp1252": "CP1252",
    "cp1250": "CP1250",
    "cp1251": "CP1251",
    "koi8_r": "KOI8-R",
}
"""Python's name -> iconv's name. Excel writes CSV in one of the Windows code pages; CP932 is that of Japan."""
_UNMARKED_NULS = 0.4
"""Latin text in UTF-16 has a zero byte in every second place."""
_UNMARKED_FROM = 10
_SAMPLE_LINES = 2000
_SAMPLE_BYTES = 2**18
_SAMPLE_LINE_BYTES = 2**16
_MOSTLY_UTF8 = 0.1
"""If so many of the lines with other letters are UTF-8, the file is UTF-8, and the other lines are damaged."""
_SHOWN_CHARACTERS = 30
_CENTRAL_EUROPEAN = re.compile("[a-z][³¹¿¼¾Ÿ][a-z]")
"""Letters of CP1250 (ł, ą, ż) read as CP1252. The two code pages differ in few letters, and CP1252 is more frequent."""


class Utf8Check:
    """Whether a file is UTF-8, block by block."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.holds = True

    def add(self, block: bytes, is_last: bool = False) -> None:
        if self.holds:
            try:
                self._decoder.decode(block, is_last)
            except UnicodeDecodeError:
                self.holds = False


def marked_encoding(beginning: bytes) -> str | None:
    """The encoding that the first bytes of a file show: by a mark, or by the zero bytes of UTF-16 without a mark."""
    for mark, name in _MARKS.items():
        if beginning.startswith(mark):
            return name
    start = beginning[:1000]
    odd = start[1::2]
    even = start[::2]
    if len(odd) >= _UNMARKED_FROM and odd.count(0) > _UNMARKED_NULS * len(odd) and not even.count(0):
        return "UTF-16LE"
    if len(odd) >= _UNMARKED_FROM and even.count(0) > _UNMARKED_NULS * len(even) and not odd.count(0):
        return "UTF-16BE"
    return None


def conversion_fault(file: Path, encoding: str, sample: str = "") -> Fault:
    """The fault for a file in another encoding than UTF-8, with the command that converts it.

    `sample` is text of the file in a guessed encoding: whoever reads it sees whether the guess is right.
    """
    target = file.with_name(f"{file.stem}.utf8{file.suffix}")
    command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(file))} > {shlex.quote(str(target))}"
    reason = f"is not UTF-8 but probably {encoding}, in which it reads “{sample}”." if sample else f"is {encoding}."
    return Fault(
        "form.unreadable-file",
        f"{reason} Convert it to UTF-8: {command}",
        cure="Run the command that is given with each file, and use the new file in place of the old one.",
    )


def other_encoding_fault(file: Path, is_first_line_decisive: bool) -> Fault | None:
    """The fault for a file with bytes that are not UTF-8; None if the file is UTF-8 and some lines are damaged.

    The first line of a CSV file is its header, and that of an array may be the whole file: if it is damaged, no record
    can be read.
    """
    damaged, other_lines, is_first_damaged = _damaged_lines(file)
    if not damaged:
        return None
    is_certain = is_first_line_decisive and is_first_damaged
    if not is_certain and (len(damaged) == 1 or len(damaged) < (1 - _MOSTLY_UTF8) * other_lines):
        return None
    sample = b"\n".join(damaged)[:_SAMPLE_BYTES]
    encoding = _encoding_of(sample)
    if encoding is None:
        return Fault(
            "form.unreadable-file",
            "is not UTF-8, nor another encoding that is recognised. Export it again as UTF-8",
            cure="Export the file again as UTF-8.",
        )
    text = " ".join(sample.decode(encoding, "replace").split())
    return conversion_fault(file, _CANDIDATES[encoding], text[:_SHOWN_CHARACTERS])


def _damaged_lines(file: Path) -> tuple[list[bytes], int, bool]:
    """Lines that are not UTF-8, the number of lines that are not ASCII, and whether the first line is damaged."""
    damaged: list[bytes] = []
    other_lines = 0
    is_first_damaged = False
    with file.open("rb") as stream:
        chunks = iter(lambda: stream.readline(_SAMPLE_LINE_BYTES), b"")
        lines = (line for chunk in chunks for line in chunk.split(b"\r"))
        numbered = ((number, line) for number, line in enumerate(lines) if not line.isascii())
        for number, line in islice(numbered, _SAMPLE_LINES):
            other_lines += 1
            try:
                line.decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data" and len(line) == _SAMPLE_LINE_BYTES:
                    continue  # the sample ends within a character
                damaged.append(line)
                is_first_damaged = is_first_damaged or number == 0
    return damaged, other_lines, is_first_damaged


def _encoding_of(sample: bytes) -> str | None:
    """Python's name of the most probable encoding among the candidates."""
    best = from_bytes(sample, cp_isolation=list(_CANDIDATES)).best()
    if best is None:
        return None
    western = _decoded(sample, "cp1252")
    if best.encoding == "cp1250" and western is not None and not _CENTRAL_EUROPEAN.search(western):
        return "cp1252"
    return best.encoding if best.encoding in _CANDIDATES else None


def _decoded(sample: bytes, encoding: str) -> str | None:
    try:
        return sample.decode(encoding)
    except UnicodeDecodeError:
        return None
