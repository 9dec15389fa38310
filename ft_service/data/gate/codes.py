"""The codes of the data gate: why each kind of finding hurts, what to do about it, and when it warns or fails.

Codes are stable: specs waive them by name, and adapter records keep them. So a code never changes its meaning.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Severity = Literal["fail", "warn", "info"]
RULES_VERSION = 4
"""Raise it whenever a check changes its results, so that data checked by the old rules is checked again."""


@dataclass(frozen=True)
class Code:
    """One kind of finding. It warns, or fails, from this share of the records on; None means never."""

    id: str
    why: str
    cure: str
    warns_from: float | None = 0.0
    fails_from: float | None = None
    leaves_out: bool = False
    """Whether a record with this finding is left out, because it is unusable or a copy."""
    counts: str = "record"
    """What the count of a finding counts, in the singular."""

    def severity(self, share: float) -> Severity:
        """The severity when this share of the records has the finding (at least one record does)."""
        if self.fails_from is not None and share >= self.fails_from:
            return "fail"
        return "warn" if self.warns_from is not None and share >= self.warns_from else "info"


MANY_BROKEN = 0.05
"""So many broken records point to a broken converter or export, so the other records are suspect too."""


def _broken(id: str, why: str, cure: str) -> Code:
    return Code(id, why, cure, warns_from=0.0, fails_from=MANY_BROKEN, leaves_out=True)


_TABLE = (
    # -- form --------------------------------------------------------------------------------------------------------
    _broken(
        "form.unreadable",
        "A line that cannot be read is missing from the training data.",
        "Fix that line or remove it.",
    ),
    Code(
        "form.unreadable-file",
        "A file that cannot be read to its end is missing from the data, and nobody knows how many records it holds.",
        "Fix or convert the file, or remove it from the spec.",
        fails_from=0.0,
        leaves_out=True,
    ),
    Code(
        "form.empty-source",
        "A source without records teaches nothing; an earlier step probably failed.",
        "Name a file that has records.",
        fails_from=0.0,
        counts="source",
    ),
    Code(
        "form.absent-column",
        "No record has this column, so what it should hold (a context, a system prompt) is not trained on.",
        "Correct the name in the source's `columns`, or remove it there.",
        fails_from=0.0,
        counts="column",
    ),
    Code(
        "form.unused-field",
        "Content of these fields is not trained on.",
        "Name what is missing in the source's `columns`; fields that are no part of the conversation can stay.",
        counts="field",
    ),
    Code(
        "form.foreign-file",
        "Files of this type are not read, so their content is not trained on.",
        "Convert the file, or move it out of the folder.",
        warns_from=None,
        counts="file",
    ),
    Code(
        "form.other-layout",
        "The content of the file differs from what its name says, so it was read by its content.",
        "Check that these are all its records, and rename or convert the file.",
        warns_from=None,
        counts="file",
    ),
    Code(
        "form.null-text",
        "A missing value that was written as a word (nan, None, NULL) is trained on as if it were text.",
        "Write missing values as empty (pandas: fillna('')), unless the word is the answer itself.",
        fails_from=0.5,
    ),
    _broken("form.wrong-type", "A value of the wrong type holds no text to train on.", "Write the value as text."),
    _broken(
        "form.missing-column",
        "Without this column the record has no question or no answer.",
        "Name the columns in the source's `columns`, or fix the record.",
    ),
    _broken(
        "form.unknown-role",
        "The chat format has no place for a turn with an unknown role.",
        "Use the roles system, user, assistant and tool.",
    ),
    _broken(
        "form.two-systems",
        "A conversation has one system prompt; with two of them, one would be lost.",
        "Keep the system column or the system turn.",
    ),
    _broken(
        "form.tool-call",
        "The Llama 3.1 chat template cannot write these tools or this call, so the model would never meet them.",
        "Write one call in a turn, without text beside it, with a JSON object of arguments; begin with a user turn.",
    ),
    _broken(
        "form.image",
        "Images are not supported, and a text about an image that the model does not see teaches it to invent.",
        "Remove the record; if its text makes sense alone, remove the image and its mark.",
    ),
    _broken(
        "form.no-answer",
        "Only assistant turns are trained on, so a record without one teaches nothing.",
        "Add an answer or remove the record.",
    ),
    _broken("form.empty-output", "An empty answer teaches the model to answer with nothing.", "Write the answer."),
    _broken(
        "form.empty-input",
        "An answer to an empty question teaches the model to answer without a question.",
        "Write the question.",
    ),
    _broken(
        "form.encoding",
        "Characters lost in a wrong decoding appear again in the model's answers.",
        "Export the data again as UTF-8; lost characters cannot be restored.",
    ),
    Code(
        "form.mojibake",
        "Text decoded with the wrong encoding teaches the model to write garbled letters.",
        "Decode the source again with its true encoding (`ftfy` repairs most of it).",
        fails_from=MANY_BROKEN,
    ),
    Code(
        "form.role-order",
        "At inference, user and assistant turns alternate; the model never meets any other order.",
        "Put system first, then user and assistant in turn, and end with the assistant.",
        fails_from=0.5,
    ),
    Code(
        "form.control-characters",
        "Control characters are invisible to people but are tokens to the model, which learns to write them.",
        "Remove them.",
    ),
    Code(
        "form.special-tokens",
        "Template text inside a message teaches the model to write it, and to end its turns at random.",
        "Remove it where it ends a message: the chat template adds the special tokens itself.",
        fails_from=MANY_BROKEN,
    ),
    Code(
        "form.html",
        "HTML left over from a web page appears again in the model's answers.",
        "Convert it to plain text or Markdown.",
    ),
    Code(
        "form.cut-off",
        "Answers that are cut off in mid-sentence teach the model to stop there.",
        "Export the whole answers; remove those that a length limit cut off.",
        fails_from=0.2,
    ),
    # -- training signal -----------------------------------------------------------------------------------------------
    _broken(
        "signal.no-loss-tokens",
        "max_seq_len cuts off the whole answer, so the record teaches nothing.",
        "Raise data.max_seq_len or shorten the question.",
    ),
    Code(
        "signal.truncated",
        "Tokens beyond max_seq_len are lost, and with them the end of the turn, so the model does not learn to stop.",
        "Raise data.max_seq_len, or split long records.",
        warns_from=0.01,
        fails_from=0.5,
    ),
    Code(
        "signal.few-loss-tokens",
        "Most of the computation goes into questions; few of the tokens are answers that are trained on.",
        "Shorten prompts that repeat, or write fuller answers.",
        warns_from=None,
    ),
    Code(
        "signal.end-not-trained",
        "Where the end of the turn is not trained on, the model does not learn to stop.",
        "Raise data.max_seq_len, and end every conversation with an answer.",
        warns_from=0.05,
        fails_from=0.5,
    ),
    Code(
        "signal.round-trip",
        "The tokenizer or the template changes this text, so the model learns a text that differs from the data.",
        "Use the tokenizer of the base, and remove characters that it cannot encode.",
        fails_from=MANY_BROKEN,
    ),
    # -- quality -------------------------------------------------------------------------------------------------------
    Code(
        "quality.exact-duplicate",
        "A repeated record is trained on more often than the others, and the model memorises it.",
        "Remove the copies (`ft data clean`).",
        warns_from=0.01,
        fails_from=0.5,
        leaves_out=True,
    ),
    Code(
        "quality.near-duplicate",
        "The model memorises records that differ by a few characters, as it does exact copies.",
        "Keep one record of each group.",
        warns_from=0.01,
        fails_from=0.5,
    ),
    Code(
        "quality.contradiction",
        "Different answers to the same question teach the model to guess.",
        "Decide which answer is right, or make the questions differ.",
        fails_from=0.1,
    ),
    Code(
        "quality.copied-instruction",
        "An answer that repeats its question teaches the model to repeat questions.",
        "Remove the question from the answer.",
    ),
    Code(
        "quality.refusal",
        "Refusals left over from another assistant teach the model to refuse.",
        "Remove them, unless refusing is the skill to learn.",
    ),
    Code(
        "quality.boilerplate",
        "Stock phrases are easy to learn and take the place of content.",
        "Remove the phrase and keep the answer.",
        warns_from=0.05,
    ),
    Code(
        "quality.too-short",
        "A one-word answer among full sentences teaches the model to answer too briefly.",
        "Write the full answer or remove the record.",
    ),
    Code(
        "style.length",
        "When a few answers are far longer or shorter than the rest, the model has to guess the wanted length.",
        "Bring them to the usual length, or ask for the length in the question.",
        warns_from=0.01,
    ),
    Code(
        "style.register",
        "When polite and plain (or formal and casual) answers are mixed, the model's tone is random.",
        "Rewrite the smaller part in the tone of the larger part.",
        warns_from=0.01,
    ),
    Code(
        "style.format",
        "When answers have different formats (list, JSON, code, prose), the model's format is random.",
        "Use one format, or ask for the other in the question.",
        warns_from=0.05,
    ),
    Code(
        "style.language",
        "Answers in another language than the question or the other answers teach the model to switch languages.",
        "Translate or remove them, or ask for the language in the question.",
        warns_from=0.01,
    ),
    Code(
        "balance.openings",
        "When most answers begin in the same few ways, the model begins every answer so.",
        "Vary how answers begin, or remove the common opening.",
    ),
    Code(
        "balance.templates",
        "The model learns the few templates of the questions, and fails on questions that are phrased differently.",
        "Phrase the questions in more ways.",
        warns_from=0.9,
    ),
    Code(
        "balance.labels",
        "When one label dominates, the model learns to give it always, because that is nearly always right.",
        "Add records of the other labels or remove some of this one.",
    ),
    # -- leakage -------------------------------------------------------------------------------------------------------
    Code(
        "leak.validation",
        "Validation loss on records that are trained on measures memory, and early stopping relies on it.",
        "Remove these records from one of the two, or make a new split without leaks (`ft data split`).",
        fails_from=0.1,
    ),
    Code(
        "leak.canned-answer",
        "Validation loss on answers that training repeats measures memory, although their questions are not leaked.",
        "Nothing to do if the answer is meant to be canned; compare validation losses only on the same data.",
        warns_from=0.1,
    ),
    Code(
        "leak.evaluation",
        "Evaluation scores mean nothing when the evaluation questions are in the training data.",
        "Remove these records from the training data.",
        fails_from=0.01,
    ),
    Code(
        "leak.unread-evaluation",
        "Evaluation records that cannot be read cannot be searched for in the training data.",
        "Set its format and columns as for a training source; answers are not needed.",
        fails_from=MANY_BROKEN,
        counts="evaluation record",
    ),
    # -- private data --------------------------------------------------------------------------------------------------
    Code(
        "private.email",
        "The model can repeat e-mail addresses that it was trained on.",
        "Replace them with placeholders (`ft data clean --redact`).",
    ),
    Code(
        "private.phone",
        "The model can repeat phone numbers that it was trained on.",
        "Replace them with placeholders (`ft data clean --redact`).",
    ),
    Code(
        "private.card",
        "A valid card number in training data breaches its owner's privacy, and often PCI DSS.",
        "Replace it with a placeholder (`ft data clean --redact`).",
        fails_from=0.0,
    ),
    Code(
        "private.key",
        "The model can reveal a key from the training data to any user.",
        "Revoke the key, then remove it from the data.",
        fails_from=0.0,
    ),
    Code(
        "private.iban",
        "The model can repeat bank account numbers that it was trained on.",
        "Replace them with placeholders (`ft data clean --redact`).",
    ),
    Code(
        "private.ssn",
        "A social security number in training data lets others pose as its owner.",
        "Replace it with a placeholder (`ft data clean --redact`).",
        fails_from=0.0,
    ),
    Code(
        "private.my-number",
        "Japanese law (the My Number Act) allows few uses of a My Number, and training a model is none of them.",
        "Replace it with a placeholder (`ft data clean --redact`).",
        fails_from=0.0,
    ),
    Code(
        "private.password",
        "The model can reveal a password from the training data to any user.",
        "Change the password, and replace it with a placeholder (`ft data clean --redact`).",
    ),
    # -- rights (shares are of sources) --------------------------------------------------------------------------------
    Code(
        "rights.no-source",
        "Without its origin nobody can check later whether the data may be used.",
        "Set `source` in the data source: a URL, or who made the data.",
        fails_from=0.0,
        counts="source",
    ),
    Code(
        "rights.no-license",
        "Without a license nobody may use the data, or publish a model trained on it.",
        "Set `license` to its SPDX id (LicenseRef-OWN for your own data).",
        fails_from=0.0,
        counts="source",
    ),
    Code(
        "rights.unknown-license",
        "This license is not in the catalog, so its conditions are unknown.",
        "Use an SPDX id (see spdx.org/licenses), or LicenseRef-NAME for a license without one.",
        counts="source",
    ),
    Code(
        "rights.non-commercial",
        "The adapter may not be used commercially, or published under a license that allows it.",
        "Publish under the same license, or train without this source.",
        counts="source",
    ),
    Code(
        "rights.share-alike",
        "An adapter trained on this data may have to be published under the same license.",
        "Publish under the same license, or train without this source.",
        counts="source",
    ),
    Code(
        "rights.restricted-use",
        "The license forbids some uses, and may require a name for what is made with the data.",
        "Read the license, follow its list of uses, and name the adapter as it requires.",
        counts="source",
    ),
    Code(
        "rights.no-derivatives",
        "The license forbids sharing adaptations, and it is unsettled whether an adapter is one.",
        "Ask the owner, do not publish the adapter, or train without this source.",
        counts="source",
    ),
    Code(
        "rights.attribution",
        "Whoever publishes the adapter has to name the source.",
        "Nothing to do: the model card names the source; keep it there.",
        warns_from=None,
        counts="source",
    ),
    Code(
        "rights.base-license",
        "The adapter inherits the conditions of its base's license.",
        "Follow them when you publish; the model card lists them.",
        warns_from=None,
        counts="license",
    ),
    # -- size ----------------------------------------------------------------------------------------------------------
    Code(
        "size.too-few",
        "Fewer than ten records are too few to learn from.",
        "Add records; a narrow skill needs about 500.",
        fails_from=0.0,
    ),
    Code(
        "size.small",
        "With fewer than 500 records a model seldom learns a skill reliably.",
        "Add records, or expect to need the prompt as well.",
    ),
)

CODES: Mapping[str, Code] = {code.id: code for code in _TABLE}
LEFT_OUT: frozenset[str] = frozenset(code.id for code in _TABLE if code.leaves_out)
