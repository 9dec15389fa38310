"""Checks of a spec against its base: problems stop the run before any worker is requested, warnings do not."""

import re

from ft_service.catalog import models
from ft_service.catalog.models import ModelShape
from ft_service.chat.format import BEGIN, END_OF_TURN, HEADER_END, HEADER_START
from ft_service.errors import Problem
from ft_service.plan.facts import SAMPLE_CONVERSATION, BaseFacts
from ft_service.plan.memory import is_target
from ft_service.spec.schema import RunSpec
from ft_service.text import counted

_NAMED = 5
"""Number of tokens or modules that a message names."""
_CHAT_FORMATS = {"alpaca", "chat"}


def base_problems(spec: RunSpec, shape: ModelShape, base: BaseFacts) -> list[Problem]:
    """Everything in the spec that this base cannot do."""
    return [
        *vision_problems(spec),
        *quantisation_problems(spec, base),
        *target_problems(spec, shape),
        *rank_problems(spec, shape),
        *length_problems(spec, base),
        *token_problems(spec, base),
    ]


# -- problems --------------------------------------------------------------------------------------------------------


def vision_problems(spec: RunSpec) -> list[Problem]:
    known = models.find(spec.model.base)
    if known is None or not known.vision:
        return []
    message = "is a vision model, and only text models (LlamaForCausalLM) can be trained"
    return [Problem("model.base", spec.model.base, message, f"Use its text backbone, {known.text_backbone}.")]


def quantisation_problems(spec: RunSpec, base: BaseFacts) -> list[Problem]:
    if base.quantization is None:
        return []
    message = f"is already quantised ({base.quantization}), and training starts from bf16 weights"
    original = models.find_within(spec.model.base)
    named = f" ({original.id})" if original else ""
    fix = f"Name the bf16 original{named}, and use method.type: qlora, which quantises it while it loads."
    return [Problem("model.base", spec.model.base, message, fix)]


def target_problems(spec: RunSpec, shape: ModelShape) -> list[Problem]:
    """A problem for each target that peft would ignore in silence, because it matches no linear layer."""
    if spec.method.type == "full":
        return []
    targets = spec.method.target_modules
    entries = [targets] if isinstance(targets, str) else targets
    if any("lm_head" in entry or "embed_tokens" in entry for entry in entries):
        message = "adapts the head or the embeddings, which servers reject and tied models share"
        return [_target_problem(targets, message)]
    if not entries:
        return [_target_problem(targets, "names no module, so nothing would be trained")]
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            return [_target_problem(targets, f"is not a valid regular expression ({error})")]
        if _matched(shape, targets):
            return []
        hint = " A string is a regular expression for the whole path; a name goes into a list: [q_proj]."
        return [_target_problem(targets, "matches no linear layer of the base", hint)]
    unmatched = [entry for entry in entries if not _matched(shape, (entry,))]
    if not unmatched:
        return []
    names = ", ".join(map(repr, unmatched))
    return [_target_problem(targets, f"{names} {'match' if len(unmatched) > 1 else 'matches'} no linear layer")]


def _target_problem(targets: str | list[str], message: str, hint: str = "") -> Problem:
    names = ", ".join(models.LINEAR_MODULES)
    return Problem("method.target_modules", targets, message, f"Use all-linear, or a list of {names}.{hint}")


def _matched(shape: ModelShape, targets: str | tuple[str, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape [out, in] of the linear layers that are adapted."""
    return [
        (name.removesuffix(".weight"), size)
        for name, size in shape.parameter_shapes()
        if name.endswith("_proj.weight") and is_target(name.removesuffix(".weight"), targets)
    ]


def rank_problems(spec: RunSpec, shape: ModelShape) -> list[Problem]:
    """B A has at most the rank min(in, out) of its layer, so a greater `lora_rank` only costs memory."""
    method = spec.method
    if method.type == "full" or target_problems(spec, shape):
        return []
    targets = method.target_modules
    matched = _matched(shape, targets if isinstance(targets, str) else tuple(targets))
    name, size = min(matched, key=lambda item: min(item[1]))
    width = min(size)
    if method.lora_rank <= width:
        return []
    message = f"is greater than the width of {name.rpartition('.')[2]}, {width} (a layer of {size[1]} x {size[0]})"
    return [Problem("method.lora_rank", method.lora_rank, message, f"Use at most {width}; 8 to 64 is usual.")]


def length_problems(spec: RunSpec, base: BaseFacts) -> list[Problem]:
    length = spec.data.max_seq_len
    if base.max_positions is None or length <= base.max_positions:
        return []
    message = f"is longer than the base's {base.max_positions:,} positions (max_position_embeddings)"
    return [Problem("data.max_seq_len", length, message, f"Use at most {base.max_positions}.")]


def token_problems(spec: RunSpec, base: BaseFacts) -> list[Problem]:
    beyond = base.tokens_beyond_embedding
    if not beyond or base.embedding_rows is None:
        return []
    named = ", ".join(f"{token!r} = {token_id}" for token, token_id in list(beyond.items())[:_NAMED])
    more = f" and {len(beyond) - _NAMED} more" if len(beyond) > _NAMED else ""
    message = (
        f"its tokenizer has {counted(len(beyond), 'token')} without an embedding: {named}{more}, but the embedding has "
        f"{base.embedding_rows:,} rows"
    )
    fix = "Use the tokenizer files that the base was published with, or a base whose embedding was resized for them."
    return [Problem("model.base", spec.model.base, message, fix)]


# -- warnings and remarks --------------------------------------------------------------------------------------------


def base_warnings(spec: RunSpec, base: BaseFacts) -> list[str]:
    """What works with this base but is probably not intended."""
    return [*_untrained_rows(spec, base), *_other_turns(spec, base)]


def base_remarks(spec: RunSpec, base: BaseFacts) -> list[str]:
    """What the base's own template adds to the trained turns, and what could not be checked."""
    remarks = []
    added = _added_before(base.own_turns)
    if added and _trains_turns(spec):
        remarks.append(
            f"The base's own chat template adds {_shortened(added)} before the first turn, and training does not. The "
            "adapter comes with the template that it is trained with: use that one."
        )
    if base.unchecked:
        remarks.append(f"Not checked against the base: {'; '.join(base.unchecked)}.")
    return remarks


def _trains_turns(spec: RunSpec) -> bool:
    return any(source.format in _CHAT_FORMATS for source in spec.data.train)


def _untrained_rows(spec: RunSpec, base: BaseFacts) -> list[str]:
    tokens = base.untrained_chat_tokens
    if not tokens or not _trains_turns(spec):
        return []
    consequence = "" if spec.method.type == "full" else " LoRA does not train them: embedding and head are frozen."
    return [
        f"The base's rows of {', '.join(tokens)} look untrained, and the data consist of turns.{consequence} Use the "
        "instruct model of this base, or data in the text format."
    ]


def _other_turns(spec: RunSpec, base: BaseFacts) -> list[str]:
    if base.own_turns is None or not _trains_turns(spec) or _added_before(base.own_turns) is not None:
        return []
    return [
        f"The base's own chat template writes turns as {_shortened(base.own_turns)}, but training writes them as "
        f"{_shortened(_sample_turns())}. Use a base with Llama 3's chat format, or expect it to unlearn its own."
    ]


def _sample_turns() -> str:
    """`SAMPLE_CONVERSATION` in the trained format, without the token that begins a text."""
    turns = (
        f"{HEADER_START}{turn['role']}{HEADER_END}\n\n{turn['content']}{END_OF_TURN}" for turn in SAMPLE_CONVERSATION
    )
    return "".join(turns)


def _added_before(own_turns: str | None) -> str | None:
    """What the own template writes before the trained turns; None if it writes the turns themselves differently."""
    if own_turns is None or not own_turns.rstrip().endswith(_sample_turns()):
        return None
    return own_turns.rstrip().removesuffix(_sample_turns()).removeprefix(BEGIN)


def _shortened(text: str, most: int = 160) -> str:
    return repr(text if len(text) <= most else f"{text[:most]}...")
