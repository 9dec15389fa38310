"""The data gate's judgement: records in, findings out. See `judge.Judge`."""

from ft_service.data.judge.codes import CODES, LEFT_OUT, Code
from ft_service.data.judge.duplicates import Looks
from ft_service.data.judge.findings import Finding, Judgement, Place
from ft_service.data.judge.form import Hit
from ft_service.data.judge.judge import Judge
from ft_service.data.judge.leakage import EvaluationSets
from ft_service.data.judge.records import Record, Source, Tokens, read_source, records_of
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
