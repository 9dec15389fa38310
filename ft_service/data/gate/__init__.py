"""The data gate's judgement: records in, findings out. See `judge.Judge`."""

from ft_service.data.gate.codes import CODES, LEFT_OUT, Code
from ft_service.data.gate.duplicates import Looks
from ft_service.data.gate.findings import Finding, Judgement, Place
from ft_service.data.gate.form import Hit
from ft_service.data.gate.judge import Judge
from ft_service.data.gate.leakage import EvaluationSets
from ft_service.data.gate.records import Record, Source, Tokens, read_source, records_of
from ft_service.data.read import Fault

__all__ = [
    "CODES",
    "LEFT_OUT",
    "Code",
    "EvaluationSets",
    "Fault",
    "Finding",
    "Hit",
    "Judge",
    "Judgement",
    "Looks",
    "Place",
    "Record",
    "Source",
    "Tokens",
    "read_source",
    "records_of",
]
