"""The data gate: checks records and reports findings. Start reading at `gate.Gate`."""

from ft_service.data.files.shard import Fault
from ft_service.data.gate.codes import CODES, LEFT_OUT, Code
from ft_service.data.gate.duplicates import SecondPass
from ft_service.data.gate.findings import Finding, Judgement, Place
from ft_service.data.gate.form import Hit
from ft_service.data.gate.gate import Gate
from ft_service.data.gate.leakage import EvaluationSets
from ft_service.data.gate.records import Record, Source, Tokens, read_source, records_of

__all__ = [
    "CODES",
    "LEFT_OUT",
    "Code",
    "EvaluationSets",
    "Fault",
    "Finding",
    "Gate",
    "Hit",
    "Judgement",
    "Place",
    "Record",
    "SecondPass",
    "Source",
    "Tokens",
    "read_source",
    "records_of",
]
