"""Checks the prompts of a plan before the first image: which exceed the text encoder's limit, and
what they contain."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from dd.prompts.duplicates import normalised
from dd.prompts.prompt import Prompt, Prompts, trim_caption
from dd.store.samples import Sample
from dd.taxonomy import Taxonomy

ADVICE = {  # by how longer prompts are treated
    "refuse": "Shorten them, or set prompts_over_limit=trim: "
    "captions then lose words at the end, never their classes.",
    "trim": "They cannot be trimmed without losing a class: "
    "shorten them, or give them fewer classes.",
}
SHOWN = 5  # examples in a message; counts are always complete


class Reader(Protocol):
    """What is needed of a generator's text encoder: :class:`dd.generators.base.Generator`."""

    @property
    def token_limit(self) -> int: ...
    def token_count(self, text: str) -> int: ...
    def spans(self, sample: Sample) -> Any: ...


def within_limit(prompts: Prompts, generator: Reader, over_limit: str = "refuse") -> Prompts:
    """The prompts, none longer than the text encoder reads: ``generator.token_count(text)`` (start
    and end tokens included) is at most ``generator.token_limit``.

    Longer prompts are refused, all in one ValueError. With ``over_limit="trim"`` their captions
    lose words at the end, but never class words. A prompt that cannot be trimmed like this, or a
    class prompt over the limit, is refused in both cases.
    """
    limit = generator.token_limit
    tokens: dict[str, int] = {}
    answers: dict[Prompt, Prompt] = {}
    refused: dict[Prompt, str] = {}

    def fits(text: str) -> bool:
        if text not in tokens:
            tokens[text] = generator.token_count(text)
        return tokens[text] <= limit

    for prompt in dict.fromkeys(prompts):  # a plan repeats its prompts
        answers[prompt] = prompt
        if not fits(prompt.class_prompt):
            refused[prompt] = f"{tokens[prompt.class_prompt]} tokens of class words alone"
        elif not fits(prompt.text):
            shorter = trim_caption(prompt, fits) if over_limit == "trim" else None
            if shorter is None:
                refused[prompt] = f"{tokens[prompt.text]} tokens"
            else:
                answers[prompt] = shorter
    if refused:
        number = sum(prompt in refused for prompt in prompts)
        first = [f"  {why}: {prompt.text}" for prompt, why in list(refused.items())[:SHOWN]]
        raise ValueError(
            f"{number} of {len(prompts)} prompts ({len(refused)} different) are longer than the "
            f"{limit} tokens that the text encoder reads; "
            "the class words at their ends would be cut off. The first:\n"
            + "\n".join([*first, ADVICE[over_limit]])
        )
    trimmed = sum(answers[prompt] != prompt for prompt in prompts)
    return Prompts([answers[prompt] for prompt in prompts], prompts.dropped, trimmed)


def check_spans(plan: Iterable[Sample], generator: Reader) -> None:
    """ValueError that counts the prompts whose class words the generator cannot find, and lists the
    first few."""
    different: dict[tuple[str, str], Sample] = {}
    for sample in plan:
        different.setdefault((sample.prompt, sample.class_prompt), sample)
    messages = []
    for sample in different.values():
        try:
            generator.spans(sample)
        except ValueError as error:
            messages.append(str(error))
    if messages:
        raise ValueError(
            f"{len(messages)} different prompts cannot be used:\n  " + "\n  ".join(messages[:SHOWN])
        )


def summarise(prompts: Prompts, taxonomy: Taxonomy, generator: Reader) -> dict[str, Any]:
    """Counts of a plan's prompts: by class, with more than one class, repeated; its longest
    prompts; what was left out."""
    texts = Counter(prompt.text for prompt in prompts)
    asked = Counter(name for prompt in prompts for name in prompt.classes)
    longest = sorted(
        ((generator.token_count(text), text) for text in texts),
        key=lambda pair: (-pair[0], pair[1]),
    )
    return {
        "prompts": len(prompts),
        "classes": {name: asked[name] for name in taxonomy.names},
        "multi_class": sum(len(prompt.classes) > 1 for prompt in prompts),
        "different": len(texts),
        "different_words": len({normalised(text) for text in texts}),
        "most_frequent": texts.most_common(1)[0],
        "longest": longest[:3],
        "token_limit": generator.token_limit,
        "trimmed": prompts.trimmed,
        "dropped": dict(Counter(row["reason"] for row in prompts.dropped)),
        "dropped_first": [r for r in prompts.dropped if r["reason"] == "names no class"][:SHOWN],
    }


def print_summary(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print the counts of :func:`summarise` as tables."""
    console, n = console or Console(), summary["prompts"]
    facts = Table(show_header=False, box=None, padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_row("prompts", f"{n:,}")
    facts.add_row("with more than one class", f"{100 * summary['multi_class'] / n:.0f} %")
    same = summary["different"] - summary["different_words"]
    but_for = f", {same:,} of them but for case, punctuation" if same else ""
    facts.add_row("different", f"{summary['different']:,}{but_for}")
    text, times = summary["most_frequent"]
    if times > 1:
        facts.add_row("most frequent", f"{times:,} x {text}")
    for i, (tokens, longest) in enumerate(summary["longest"]):
        facts.add_row(
            "" if i else "longest", f"{tokens} of {summary['token_limit']} tokens: {longest}"
        )
    if summary["trimmed"]:
        facts.add_row("caption trimmed to the limit", f"{summary['trimmed']:,}")
    for reason, number in summary["dropped"].items():
        facts.add_row("captions left out", f"{number:,}: {reason}")
    for row in summary["dropped_first"]:
        facts.add_row("", f"{row['filename'] or ''} {row['caption']!r}".strip())
    missing = [name for name, number in summary["classes"].items() if not number]
    if missing:
        facts.add_row("classes without a prompt", ", ".join(missing))
    columns = max(1, min(4, console.width // 32))
    classes = Table(
        "class", "prompts", *["class", "prompts"] * (columns - 1), box=None, padding=(0, 2)
    )
    rows = [(name, f"{number:,}") for name, number in summary["classes"].items()]
    for i in range(0, len(rows), columns):
        classes.add_row(*(cell for row in rows[i : i + columns] for cell in row))
    console.print(facts, classes, markup=False)
