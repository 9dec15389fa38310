"""What the gate looks for: one line of this table a code, with why it hurts, what to do, and how grave it is.

Codes are stable: specs waive them by name and records keep them, so a code is never given a second meaning.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Severity = Literal["fail", "warn", "info"]
RULES_VERSION = 2
"""Raised whenever a check comes to another result, so that an old judgement is not taken for today's."""


@dataclass(frozen=True)
class Code:
    """One kind of finding. It warns, or fails, from a share of the records on; None: never."""

    id: str
    why: str
    cure: str
    warns_from: float | None = 0.0
    fails_from: float | None = None
    leaves_out: bool = False
    """Such a record cannot be trained on, or would be trained on twice: it goes to quarantine."""

    def severity(self, share: float) -> Severity:
        """How grave it is when this share of the records has it (there being at least one)."""
        if self.fails_from is not None and share >= self.fails_from:
            return "fail"
        return "warn" if self.warns_from is not None and share >= self.warns_from else "info"


MANY_BROKEN = 0.05
"""One broken record in twenty is no slip of a hand: a converter or an export went wrong, so the rest is suspect too."""


def _broken(id: str, why: str, cure: str) -> Code:
    return Code(id, why, cure, warns_from=0.0, fails_from=MANY_BROKEN, leaves_out=True)


_TABLE = (
    # -- form --------------------------------------------------------------------------------------------------------
    _broken("form.unreadable", "What cannot be read cannot be taught.", "Mend the line or remove it."),
    Code(
        "form.unreadable-file",
        "A file that cannot be read through is missing from the data, and nobody knows how much of it.",
        "Mend the file, convert it, or take it out of the spec.",
        fails_from=0.0,
        leaves_out=True,
    ),
    Code(
        "form.empty-source",
        "A source without records teaches nothing; something went wrong before it came here.",
        "Name a file that has some.",
        fails_from=0.0,
    ),
    Code(
        "form.absent-column",
        "Without the column that the source names, what stands in it (a context, a system prompt) is not taught.",
        "Name the column as the file does in the source's `columns`, or leave it out of them.",
        fails_from=0.0,
    ),
    Code(
        "form.foreign-file",
        "A file of a kind that is not read teaches nothing; perhaps it was meant to.",
        "Convert it, or move it out of the folder.",
        warns_from=None,
    ),
    _broken("form.wrong-type", "A value of the wrong type has no text to train on.", "Write the value as text."),
    _broken(
        "form.missing-column",
        "Without its column a record has no question or no answer.",
        "Name the columns in the source's `columns`, or mend the record.",
    ),
    _broken(
        "form.unknown-role",
        "The chat format has no place for a turn of an unknown role.",
        "Use system, user, assistant and tool.",
    ),
    _broken(
        "form.no-answer",
        "Only assistant turns are trained on, so a record without one teaches nothing.",
        "Add the answer or remove the record.",
    ),
    _broken("form.empty-output", "An empty answer teaches the model to stay silent.", "Write the answer."),
    _broken("form.empty-input", "An answer to an empty question teaches to answer anything.", "Write the question."),
    _broken(
        "form.encoding",
        "Characters that were lost in reading another encoding come back in the model's answers.",
        "Export the data again as UTF-8; what was replaced cannot be restored.",
    ),
    Code(
        "form.mojibake",
        "Text decoded with the wrong encoding teaches garbage that looks like letters.",
        "Decode the source again with its true encoding (`ftfy` mends most of it).",
        fails_from=MANY_BROKEN,
    ),
    Code(
        "form.role-order",
        "At use, turns of user and assistant alternate; other orders are never met again.",
        "Put system first, then user and assistant in turn, and end with the assistant.",
        fails_from=0.5,
    ),
    Code(
        "form.control-characters",
        "Control characters are invisible to people and tokens to the model, which learns to emit them.",
        "Remove them.",
    ),
    Code(
        "form.special-tokens",
        "Template text inside a message teaches the model to write it out, and to end turns at random.",
        "Remove it: the chat template adds the special tokens itself.",
        fails_from=MANY_BROKEN,
    ),
    Code("form.html", "HTML left over from a web page comes back in answers.", "Convert it to plain text or Markdown."),
    Code(
        "form.cut-off",
        "Answers cut in mid-sentence teach the model to stop there.",
        "Export the answers whole; drop those that a length limit cut.",
        fails_from=0.2,
    ),
    # -- training signal -----------------------------------------------------------------------------------------------
    _broken(
        "signal.no-loss-tokens",
        "Nothing of the answer is left within max_seq_len, so the record teaches nothing.",
        "Raise data.max_seq_len or shorten the question.",
    ),
    Code(
        "signal.truncated",
        "What lies beyond max_seq_len is lost, and with it the end of the turn: the model learns not to stop.",
        "Raise data.max_seq_len, or split long records.",
        warns_from=0.01,
        fails_from=0.5,
    ),
    Code(
        "signal.few-loss-tokens",
        "Most of the computation reads questions and little of it teaches answers.",
        "Shorten prompts that repeat themselves, or write fuller answers.",
        warns_from=None,
    ),
    Code(
        "signal.end-not-trained",
        "Where the end of the turn is not trained, the model never learns to stop.",
        "Raise data.max_seq_len, and let every conversation end with an answer.",
        warns_from=0.05,
        fails_from=0.5,
    ),
    Code(
        "signal.round-trip",
        "The tokenizer or template changes this text, so the model is taught something else than the data says.",
        "Use the tokenizer of the base, and remove characters it cannot express.",
        fails_from=MANY_BROKEN,
    ),
    # -- quality -------------------------------------------------------------------------------------------------------
    Code(
        "quality.exact-duplicate",
        "A record seen twice counts twice: it is learned by heart, at the cost of the others.",
        "Remove the copies (`ft data clean`).",
        warns_from=0.01,
        fails_from=0.5,
        leaves_out=True,
    ),
    Code(
        "quality.near-duplicate",
        "Records that differ by a few characters are learned by heart like copies.",
        "Keep one of each group.",
        warns_from=0.01,
        fails_from=0.5,
    ),
    Code(
        "quality.contradiction",
        "The same question with different answers teaches to guess.",
        "Decide which answer is right, or add to the question what tells them apart.",
        fails_from=0.1,
    ),
    Code(
        "quality.copied-instruction",
        "An answer that repeats its question teaches the model to do so.",
        "Remove the question from the answer.",
    ),
    Code(
        "quality.refusal",
        "Refusals left over from another assistant teach to refuse where an answer was wanted.",
        "Remove them unless refusing is the skill.",
    ),
    Code(
        "quality.boilerplate",
        "Empty phrases are the easiest thing to learn, and they crowd out the content.",
        "Remove the phrase and keep the answer.",
        warns_from=0.05,
    ),
    Code(
        "quality.too-short",
        "An answer of a word where others are sentences teaches to give up.",
        "Write the answer out or remove the record.",
    ),
    Code(
        "style.length",
        "Answers far longer or shorter than the rest leave the model to guess how much is wanted.",
        "Bring them to the common length, or say in the question what length is wanted.",
        warns_from=0.01,
    ),
    Code(
        "style.register",
        "Polite and plain (or formal and casual) answers mixed: the model's tone will be random.",
        "Rewrite the smaller part in the tone of the larger.",
        warns_from=0.01,
    ),
    Code(
        "style.format",
        "Answers of another format (list, JSON, code, prose) than the rest leave the format to chance.",
        "Use one format, or ask for the other in the question.",
        warns_from=0.05,
    ),
    Code(
        "style.language",
        "Answers in another language than asked in, or than the rest, teach to switch languages unasked.",
        "Translate or remove them, or ask for the language in the question.",
        warns_from=0.01,
    ),
    Code(
        "balance.openings",
        "When most answers begin in one of a few ways, the model begins so whatever is asked.",
        "Vary how answers begin, or cut the common opening.",
    ),
    Code(
        "balance.templates",
        "Questions from a few templates teach the templates: a question put otherwise fails.",
        "Phrase the questions in more ways.",
        warns_from=0.9,
    ),
    Code(
        "balance.labels",
        "When one label dominates, always giving it is nearly right, so that is what is learned.",
        "Add records of the other labels or drop some of this one.",
    ),
    # -- leakage -------------------------------------------------------------------------------------------------------
    Code(
        "leak.validation",
        "Validation loss on text that was trained on measures memory, and early stopping trusts it.",
        "Remove these records from one of the two.",
        fails_from=0.1,
    ),
    Code(
        "leak.evaluation",
        "Scores on an evaluation set that was trained on are worth nothing.",
        "Remove these records from the training data.",
        fails_from=0.01,
    ),
    Code(
        "leak.unread-evaluation",
        "What of an evaluation set cannot be read cannot be looked for in the training data.",
        "Name its format and columns as those of a training source; answers are not needed.",
        fails_from=MANY_BROKEN,
    ),
    # -- private data --------------------------------------------------------------------------------------------------
    Code("private.email", "A model can recite addresses it was trained on.", "Replace them by placeholders."),
    Code("private.phone", "A model can recite phone numbers it was trained on.", "Replace them by placeholders."),
    Code(
        "private.card",
        "A valid card number in training data is a breach of its owner's privacy, and often of PCI DSS.",
        "Replace it by a placeholder.",
        fails_from=0.0,
    ),
    Code(
        "private.key",
        "A key in training data can be recited to any user of the model.",
        "Revoke the key, then remove it from the data.",
        fails_from=0.0,
    ),
    # -- rights (shares are of sources) --------------------------------------------------------------------------------
    Code(
        "rights.no-source",
        "Without its origin nobody can tell later by what right the data was used.",
        "Set `source` in the data source: a URL, or who made it.",
        fails_from=0.0,
    ),
    Code(
        "rights.no-license",
        "Without a license there is no right to use the data, and none to publish what is trained on it.",
        "Set `license` to its SPDX id (LicenseRef-OWN for your own data).",
        fails_from=0.0,
    ),
    Code(
        "rights.unknown-license",
        "Nothing is known of what this license allows.",
        "Write the SPDX id, see spdx.org/licenses; LicenseRef-NAME for one without an id.",
    ),
    Code(
        "rights.non-commercial",
        "The adapter may not serve commercial ends, nor be published under a license that allows them.",
        "Publish under the same license, or train without this source.",
    ),
    Code(
        "rights.share-alike",
        "Who publishes an adapter made from it may have to do so under the same license.",
        "Publish under the same license, or train without this source.",
    ),
    Code(
        "rights.restricted-use",
        "The license forbids some uses, and may ask that what is made with it bears a name.",
        "Read it, keep to its list of uses, and name the adapter as it asks.",
    ),
    Code(
        "rights.no-derivatives",
        "The license forbids to pass on adaptations, and whether an adapter is one is unsettled.",
        "Ask the owner, keep the adapter to yourself, or train without this source.",
    ),
    Code(
        "rights.attribution",
        "Whoever publishes the adapter has to name the source.",
        "Keep the source in the model card; it is written there by itself.",
        warns_from=None,
    ),
    Code(
        "rights.base-license",
        "Whatever is trained on this base inherits its license's duties.",
        "Keep them when publishing; the model card holds them.",
        warns_from=None,
    ),
    # -- size ----------------------------------------------------------------------------------------------------------
    Code(
        "size.too-few",
        "Fewer than ten records cannot teach: there is nothing to generalise from.",
        "Write more; 500 is where a narrow skill begins.",
        fails_from=0.0,
    ),
    Code(
        "size.small",
        "Below 500 records a skill is seldom learned reliably.",
        "Write more, or expect to lean on the prompt as well.",
    ),
)

CODES: Mapping[str, Code] = {code.id: code for code in _TABLE}
LEFT_OUT: frozenset[str] = frozenset(code.id for code in _TABLE if code.leaves_out)
