"""Model licenses: names, links, and the duties of whoever publishes a derived model."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class License:
    """Duties of whoever publishes a derived model. A summary and not legal advice: only the license text counts."""

    id: str
    """Identifier in model cards on the hub."""
    name: str
    text_url: str
    acceptable_use_url: str
    naming_prefix: str
    """Start of the name of any derived model that is distributed or made available."""
    display: str
    """Text to show prominently on a related website, user interface, blog post, about page or documentation."""
    attribution: str
    """Text to include in a "Notice" text file in every distributed copy."""
    duties: tuple[str, ...]


def _community_license(
    id: str, release: str, released: str, site: str, naming_prefix: str, display: str, *further_duties: str
) -> License:
    name = f"{release} Community License"
    attribution = f"{release} is licensed under the {name}, Copyright © Meta Platforms, Inc. All Rights Reserved."
    return License(
        id=id,
        name=name,
        text_url=f"{site}/license",
        acceptable_use_url=f"{site}/use-policy",
        naming_prefix=naming_prefix,
        display=display,
        attribution=attribution,
        duties=(
            f"Provide a copy of the {name} with the model.",
            f"Show “{display}” prominently on a related website, interface, blog post, about page or documentation.",
            f"Start the name of a model that is distributed or made available with “{naming_prefix}”.",
            f"Include in a “Notice” text file with every copy: “{attribution}”",
            f"Comply with the law and the Acceptable Use Policy: {site}/use-policy",
            f"Companies with more than 700 million monthly active users in the month before {released} need a separate "
            "license from Meta.",
            *further_duties,
        ),
    )


_OUTPUTS_NAME_MODELS = "The same applies to the name of a model trained with outputs of this one."

LLAMA_3 = _community_license(
    "llama3",
    "Meta Llama 3",
    "18 April 2024",
    "https://www.llama.com/llama3",
    "Llama 3",
    "Built with Meta Llama 3",
    "Do not use the model or its outputs to improve any large language model other than Llama 3 and its derivatives.",
)
LLAMA_3_1 = _community_license(
    "llama3.1",
    "Llama 3.1",
    "23 July 2024",
    "https://www.llama.com/llama3_1",
    "Llama",
    "Built with Llama",
    _OUTPUTS_NAME_MODELS,
)
LLAMA_3_2 = _community_license(
    "llama3.2",
    "Llama 3.2",
    "25 September 2024",
    "https://www.llama.com/llama3_2",
    "Llama",
    "Built with Llama",
    _OUTPUTS_NAME_MODELS,
)
LLAMA_3_2_VISION = replace(
    LLAMA_3_2,
    duties=(
        *LLAMA_3_2.duties,
        "The vision models are not licensed to individuals domiciled in the European Union, nor to companies with "
        "their principal place of business there; this does not affect end users of products built on them.",
    ),
)
LLAMA_3_3 = _community_license(
    "llama3.3",
    "Llama 3.3",
    "6 December 2024",
    "https://www.llama.com/llama3_3",
    "Llama",
    "Built with Llama",
    _OUTPUTS_NAME_MODELS,
)
