"""The prompts of a plan before the first image: which exceed the text encoder's limit, and what
they are about."""

from collections import Counter

from rich.console import Console
from rich.table import Table

from dd.prompts.duplicates import normalised
from dd.prompts.prompt import Prompts, trim_caption

OVER_LIMIT = ("refuse", "trim")
SHOWN = 5  # examples in a message; counts are always whole


def within_limit(prompts, generator, over_limit: str = "refuse") -> Prompts:
    """The prompts, none longer than the text encoder reads: ``generator.token_count(text)`` (start
    and end tokens included) is at most ``generator.token_limit``.

    Longer ones are refused, all in one ValueError, or with ``over_limit="trim"`` their captions
    lose words at the end; class words never go. A prompt that cannot be trimmed so, or a class
    prompt over the limit, is refused in both cases.
    """
    if over_limit not in OVER_LIMIT:
        raise ValueError(f"prompts_over_limit={over_limit!r}; allowed: {', '.join(OVER_LIMIT)}")
    limit, tokens, answers, refused = generator.token_limit, {}, {}, {}

    def fits(text):
        if text not in tokens:
            tokens[text] = generator.token_count(text)
        return tokens[text] <= limit

    for prompt in dict.fromkeys(prompts):  # a plan repeats its prompts
        answers[prompt] = prompt
        if not fits(prompt.class_prompt):
            refused[prompt] = f"{tokens[prompt.class_prompt]} tokens of class words alone"
        elif not fits(prompt.text):
            answers[prompt] = trim_caption(prompt, fits) if over_limit == "trim" else None
            refused |= {} if answers[prompt] else {prompt: f"{tokens[prompt.text]} tokens"}
    if refused:
        number = sum(prompt in refused for prompt in prompts)
        shown = "\n".join(
            f"  {why}: {prompt.text}" for prompt, why in list(refused.items())[:SHOWN]
        )
        advice = (
            "They cannot be trimmed without losing a class: shorten them, or give them fewer "
            "classes."
            if over_limit == "trim"
            else "Shorten them, or set prompts_over_limit=trim: captions then lose words at the "
            "end, never their classes."
        )
        raise ValueError(
            f"{number} of {len(prompts)} prompts ({len(refused)} different) are longer than the "
            f"{limit} tokens that the text "
            "encoder reads; the class words at their ends would be cut off. The "
            f"first:\n{shown}\n{advice}"
        )
    trimmed = sum(answers[prompt] != prompt for prompt in prompts)
    return Prompts(
        [answers[prompt] for prompt in prompts], getattr(prompts, "dropped", []), trimmed
    )


def check_spans(plan, generator) -> None:
    """ValueError with every prompt whose class words the generator cannot find (their number,
    the first few)."""
    wrong = {}
    for sample in plan:
        key = (sample.prompt, sample.class_prompt)
        if key in wrong:
            continue
        try:
            generator.spans(sample)
            wrong[key] = None
        except ValueError as error:
            wrong[key] = str(error)
    messages = [message for message in wrong.values() if message]
    if messages:
        raise ValueError(
            f"{len(messages)} different prompts cannot be used:\n  " + "\n  ".join(messages[:SHOWN])
        )


def summarise(prompts, taxonomy, generator) -> dict:
    """Counts of a plan's prompts: by class, with more than one class, repeated; its longest
    prompts; what was left out."""
    texts = Counter(prompt.text for prompt in prompts)
    asked = Counter(name for prompt in prompts for name in prompt.classes)
    longest = sorted(
        ((generator.token_count(text), text) for text in texts),
        key=lambda pair: (-pair[0], pair[1]),
    )
    dropped = getattr(prompts, "dropped", [])
    return {
        "prompts": len(prompts),
        "classes": {name: asked[name] for name in taxonomy.names},
        "multi_class": sum(len(prompt.classes) > 1 for prompt in prompts),
        "different": len(texts),
        "different_words": len({normalised(text) for text in texts}),
        "most_frequent": texts.most_common(1)[0],
        "longest": longest[:3],
        "token_limit": generator.token_limit,
        "trimmed": getattr(prompts, "trimmed", 0),
        "dropped": dict(Counter(row["reason"] for row in dropped)),
        "dropped_first": [row for row in dropped if row["reason"] == "names no class"][:SHOWN],
    }


def print_summary(summary: dict, console: Console | None = None) -> None:
    """The counts of :func:`summarise` as tables for people."""
    console, n = console or Console(), summary["prompts"]
    facts = Table(show_header=False, box=None, padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_row("prompts", f"{n:,}")
    facts.add_row("with more than one class", f"{100 * summary['multi_class'] / n:.0f} %")
    same = summary["different"] - summary["different_words"]
    facts.add_row(
        "different",
        f"{summary['different']:,}"
        + (f", {same:,} of them but for case, punctuation" if same else ""),
    )
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
