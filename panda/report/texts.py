"""Texts as HTML: samples with the loss of each token in colour, answers, and what data consists of."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from collections.abc import Sequence

from panda.files.terminal import number_of
from panda.hooks.lengths import name_of
from panda.hooks.lengths import shows_cut
from panda.report.charts import GRID
from panda.report.charts import Scale
from panda.report.charts import label
from panda.report.html import Html
from panda.report.html import element
from panda.report.html import html
from panda.report.html import table
from panda.report.reported import Answer
from panda.report.reported import Data
from panda.report.reported import Missing
from panda.report.reported import Piece
from panda.report.reported import Reported
from panda.report.reported import ShownSample

HEAT = (0.1, 0.5, 1.0, 2.0, 4.0, 7.0)
"""Losses of a token, in nats, at which its colour changes."""


def missing(part: Missing, what: str) -> Html:
    """That the page lacks ``what``, and why."""
    return element("p", f"{what} cannot be shown: {part.why}", class_="missing")


# -- samples


def scale(runs: Sequence[Reported]) -> Html:
    """What the colours mean, where there are some."""
    if all(isinstance(run.samples, Missing) or run.no_losses for run in runs):
        return Html()
    bounds = ["0", *map(label, HEAT)]
    steps = [element("span", f"{low}+" if number else low, class_=f"t{number}") for number, low in enumerate(bounds)]
    said = "Loss of a token, in nats: "
    more = " Text in grey carries no loss. Point at a token to read its loss and its probability."
    return element("p", said, element("span", *steps, class_="scale"), more, class_="note")


def samples_of(run: Reported) -> Html:
    if isinstance(run.samples, Missing):
        return missing(run.samples, "Samples")
    without = missing(Missing(run.no_losses), "The losses of their tokens") if run.no_losses else ""
    return html(element("p", run.which_samples), without, *map(_sample, run.samples))


def _sample(sample: ShownSample) -> Html:
    said = []
    if sample.loss is not None:
        said.append(f"mean loss {sample.loss:.3f}")
    if sample.before is not None:
        said.append(f"before training {sample.before:.3f}")
    more = f" … and {number_of(sample.left_out, 'more token')}" if sample.left_out else ""
    return html(
        element("h3", sample.name, element("small", " ", ", ".join(said))),
        element("div", *_pieces(sample), element("span", more, class_="u"), class_="tokens", dir="auto"),
    )


def _pieces(sample: ShownSample) -> Iterator[Html]:
    plain: list[str] = []
    for piece in sample.pieces:
        if not piece.supervised:
            plain.append(piece.text)
            continue
        if plain:
            yield element("span", "".join(plain), class_="u")
            plain = []
        yield _coloured(piece)
    if plain:
        yield element("span", "".join(plain), class_="u")


def _coloured(piece: Piece) -> Html:
    newline = " nl" if "\n" in piece.text else ""
    if piece.loss is None:
        return element("span", piece.text, class_=f"s{newline}")
    each = piece.loss / piece.tokens
    several = f" over {piece.tokens} tokens" if piece.tokens > 1 else ""
    said = f"loss {piece.loss:.2f}{several}, probability {math.exp(-piece.loss):.2g}"
    return element("span", piece.text, class_=f"t{bisect_right(HEAT, each)}{newline}", title=said)


# -- answers


def answers_of(run: Reported) -> Html:
    said: list[Html] = []
    if run.evaluation_answers:
        said.append(element("p", "Evaluation data, which the run answered while it trained (eval_generate)."))
        said += _answers(run.evaluation_answers)
    if isinstance(run.answers, Missing):
        return html(*said, "" if said else missing(run.answers, "Answers"))
    return html(*said, element("p", run.which_answers), *_answers(run.answers))


def _of_spaces(text: str) -> str:
    return f"(only {text!r})" if text else "(an empty answer)"


def _answers(answers: Sequence[Answer]) -> list[Html]:
    said = []
    for answer in answers:
        said.append(element("h3", "Prompt"))
        said.append(element("div", answer.prompt, class_="text", dir="auto"))
        each = [
            element(
                "div",
                element("p", whose, class_="faint"),
                element("div", text if text.strip() else _of_spaces(text), class_="text", dir="auto"),
            )
            for whose, text in answer.answers.items()
        ]
        said.append(element("div", *each, class_="answers"))
    return said


# -- data


def data_of(run: Reported) -> Html:
    data = run.data
    if isinstance(data, Missing):
        facts = {key: run.provenance.get(key) for key in ("samples", "tokens", "supervised_tokens", "bad_rows")}
        rows = [(key.replace("_", " "), f"{value:,}") for key, value in facts.items() if isinstance(value, int)]
        return html(missing(data, "More than the run recorded"), table(rows) if rows else "")
    remarks = element("ul", *(element("li", line) for line in data.remarks)) if data.remarks else ""
    return html(table(data.counts.items()), remarks, lengths_of(data))


def lengths_of(data: Data) -> Html:
    """The histogram of the lengths of samples, with the place at which they are cut."""
    if not data.lengths:
        return Html()
    shortest, longest = data.lengths[0][0], data.lengths[-1][1]
    is_shown = shows_cut(longest, data.limit)
    furthest = max(data.limit, longest) if is_shown else longest
    margin = 1 + (furthest - shortest) // 25
    across = Scale(max(0, shortest - margin), furthest + margin)
    up = Scale(0, max(count for _, _, count in data.lengths) * 1.05)
    bars = []
    for least, most, count in data.lengths:
        left, right, top = across.place(least - 0.5), across.place(most + 0.5), GRID - up.place(count)
        bars.append(f"M{left} {GRID}V{top}H{max(right - (right - left) // 10, left + 1)}V{GRID}Z")
    limit = across.place(data.limit + 0.5)
    lines = [
        element("i", element("b", label(value)), class_="y", style=f"bottom:{up.place(value) / GRID:.2%}")
        for value in up.ticks()
        if value == int(value)
    ]
    lines += [
        element("i", element("b", label(value)), class_="x", style=f"left:{across.place(value) / GRID:.2%}")
        for value in across.ticks()
        if value == int(value)
    ]
    picture = element(
        "svg",
        element("path", d="".join(bars), class_="bars"),
        element("path", d=f"M{limit} 0V{GRID}", class_="cut") if is_shown else "",
        class_="lines",
        viewBox=f"0 0 {GRID} {GRID}",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
    rows = [(name_of(least, most), f"{count:,}") for least, most, count in data.lengths]
    where = "Dashed: max_seq_length," if is_shown else "Beyond this axis: max_seq_length,"
    return element(
        "figure",
        element("h3", "samples by their number of tokens"),
        element("div", *lines, picture, class_="plot"),
        element("p", "tokens", class_="axis"),
        element("p", f"{where} {data.limit:,} tokens; {data.cut}.", class_="note"),
        element("details", element("summary", "The same as numbers"), table(rows, ("tokens", "samples"))),
        class_="chart",
    )
