"""Blocks of Tables 1, 2, 5, 8 and 9: accuracies of the paper and of the records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from mixlora_exp.results.cells import Key, block_title
from mixlora_exp.results.condition_text import condition_text
from mixlora_exp.results.paper import (
    METHOD_TITLES,
    MODEL_TITLES,
    TASK_TITLES,
    Contradiction,
    PaperTable,
    contradictions,
    line_id,
    read_paper,
)
from mixlora_exp.results.runs import RecordedRun
from mixlora_exp.results.tables import lines
from mixlora_exp.results.tables.parts import (
    AVERAGE,
    AVERAGE_ABOVE,
    Block,
    Entry,
    Row,
    dash,
    paper,
)
from mixlora_exp.results.tables.registry import PAPER, Made, Sources
from mixlora_exp.results.tables.summary import summarize_accuracy
from mixlora_exp.results.tables.variants import (
    BASE,
    AccuracySpec,
    Members,
    Variant,
    members_of,
    variants_of,
)

STUB = ("method", "setup", "row")
NOTES = (
    "Ours: mean over n seeds; in brackets the 95 % interval over items (a score interval; items "
    "that share a passage or a question count as one cluster) and over seeds (Student's t), added "
    "in quadrature. With one seed it says nothing about other seeds. A dash was not run. "
    "#Params: printed by the paper; computed exactly from the shapes in the paper's denominator "
    "(magnitudes left out), and of all weights (magnitudes counted).",
    "° not above chance and the most frequent answer of the training split, by the interval: such "
    "a figure, or a difference between two of them, is never marked. The last average leaves out "
    "tasks on which that holds for half of the trained settings under these conditions or more, "
    "whatever table shows them.",
    "Differences are paired over the same items and seeds. Better or worse stands only where there "
    "are several seeds and Holm's correction for all such comparisons of this table leaves "
    "p at most 0.05; p and the corrected q are in results/differences.csv. "
    "The log-likelihood of the gold answer (nats, mean over items) moves also where accuracy stays "
    "at chance, and so may the area under the ROC curve (in percent, of tasks with two answers: 50 "
    "for any constant answer).",
    "Results under other conditions than the paper's (fewer rows, a limit on items, another source "
    "of data, another protocol) stand in blocks of their own, and their conditions over them.",
)
PAPER_PROTOCOL = "label_logits"
"""The paper's protocol; differences from its figures are only meaningful under it."""


def _counted(
    spec: AccuracySpec, model: str, variant: Variant, runs: Iterable[RecordedRun]
) -> tuple[float, float] | None:
    """Return #Params as (percent of the paper's denominator, percent of all weights): from the
    records, None if they differ; without records, computed from conf/model."""
    counts = [run.parameters for run in runs]
    if None in counts:
        return None
    found = {(p.get("percent_paper") or 0.0, p.get("percent_true")) for p in counts}
    if not found or variant.method == "none":
        return spec.params(model, variant)
    counted = found.pop() if len(found) == 1 else (0.0, None)
    return None if counted[1] is None else counted


def _params(
    spec: AccuracySpec,
    model: str,
    variant: Variant,
    printed: str | None,
    runs: Iterable[RecordedRun],
) -> tuple[Entry, Entry]:
    counted = _counted(spec, model, variant, runs)
    if counted is None:
        return paper(printed), dash
    paper_percent, true_percent = counted
    text = f"{true_percent:.3f} of all"
    if paper_percent:
        text = f"{paper_percent:.3f}; {text}"
    return paper(printed), Entry("text", text=text)


def _printed_row(
    variant: Variant,
    line: Mapping[str, str],
    params: Entry,
    tasks: Sequence[str],
    known: Sequence[Contradiction],
) -> Row:
    """Return the paper's line, with a mark on figures that another statement of the paper
    contradicts."""
    marked = {(c.line, c.column) for c in known if c.line is not None}
    columns = (*tasks, "avg")
    cells = [paper(line[c], mark="†" * ((line_id(line), c) in marked)) for c in columns]
    return Row((*variant.label, "paper"), (params, *cells, dash))


def _block(
    spec: AccuracySpec,
    model: str,
    printed: PaperTable,
    heading: str,
    protocol: str,
    members: Mapping[Variant, Members],
    beside_paper: bool,
    known: Sequence[Contradiction],
    words: str,
    above: frozenset[str],
) -> Block:
    context = lines.Context(spec, protocol, members, above)
    rows: list[Row] = []
    # A setup with results for one method is shown for all methods, with dashes.
    setups = {variant.setup for variant in members if variant.method != "none"}
    order = [*variants_of(spec)]
    extra = set(members) - set(order) - {BASE}
    order += sorted(extra, key=lambda v: (v.method, v.setup, v.value))
    made: dict[Variant, tuple[Row | None, Row]] = {}
    for variant in order:
        runs = [run for found in members.get(variant, {}).values() for run in found]
        key = spec.paper_key(model, variant)
        line = printed.line(**key) if key and beside_paper else None
        given = None if line is None else line.get("params_pct")
        own, counted = _params(spec, model, variant, given, runs)
        from_paper = None if line is None else _printed_row(variant, line, own, spec.tasks, known)
        if from_paper is None and variant.setup not in setups:
            continue
        found = lines.line((*variant.label, "ours"), members.get(variant, {}), context)
        found = Row(found.label, (counted, *found.cells[1:]))
        made[variant] = (from_paper, found)
        rows += [found] if from_paper is None else [from_paper, found]
        if variant not in members:
            continue
        if from_paper is not None and protocol == PAPER_PROTOCOL:
            rows.append(lines.minus((*variant.label, "ours minus paper"), found, from_paper))
        rows += lines.further(variant, context)
    rows += lines.single_multi(printed, made, context)
    rows += lines.baselines(context)
    titles = (TASK_TITLES[task] for task in spec.tasks)
    columns = ("#Params (%)", *titles, AVERAGE, AVERAGE_ABOVE)
    notes = tuple(_caveats(model, protocol, members))
    return Block(heading, STUB, columns, tuple(rows), run=bool(members), notes=notes, words=words)


def _caveats(model: str, protocol: str, members: Mapping[Variant, Members]) -> Iterator[str]:
    """Yield what a reader of a block's results has to know beside them."""
    runs = [run for by_task in members.values() for own in by_task.values() for run in own]
    trained = [run for run in runs if run.method != "none"]
    alphas: dict[float, dict[str, None]] = defaultdict(dict)
    for run in trained:
        alphas[run.trained["method"]["alpha"]].setdefault(METHOD_TITLES[run.method])
    if len(alphas) > 1:
        named = "; ".join(f"{', '.join(alphas[alpha])}: {alpha:g}" for alpha in sorted(alphas))
        yield (
            f"Alpha differs ({named}): early in training a step moves the output by about alpha "
            "times the learning rate, so that a difference may be that of alpha alone "
            "(docs/presets.md)."
        )
    counts = [run.parameters for run in trained]
    shares = [c["percent_true"] for c in counts if c is not None and c.get("percent_true")]
    if shares and max(shares) > MANY:
        ends = dict.fromkeys(f"{share:.1f}" for share in (min(shares), max(shares)))
        yield (
            f"Of {MODEL_TITLES.get(model, model)}'s parameters {' to '.join(ends)} % are trained; "
            "of the paper's models it is 0.4 to 6 %."
        )
    if protocol == "answer_text" and any("winogrande" in by_task for by_task in members.values()):
        yield (
            "WinoGrande: the candidate after the sentence with its blank is scored, which is no "
            "partial scoring."
        )


MANY = 10.0
"""Percent of trained parameters that are named beside a result."""


def _above(spec: AccuracySpec, key: Key, sources: Sources) -> frozenset[str]:
    runs = sources.blocks.runs.get(key, ())
    return lines.tasks_above_chance(spec.tasks, key[1], runs, sources.standards)


def accuracy_table(number: int, spec: AccuracySpec, sources: Sources) -> Made:
    """Build a table: first the paper's models with full runs, then every other block of runs with
    its conditions."""
    printed, standards = read_paper(PAPER, number), sources.standards
    known = list(contradictions(PAPER, number))
    found: dict[Key, Mapping[Variant, Members]] = {}
    for key, runs in sources.blocks.runs.items():
        members = members_of(spec, runs, standards)
        values = {variant.value for variant in members if variant != BASE}
        # A table that varies a setting excludes blocks with only one value of it.
        if members and (spec.values == ("",) or len(values) > 1):
            found[key] = members
    made: list[Block] = []
    for model in spec.models:
        full = [k for k in found if k[0] == model and block_title(k, standards)[1]]
        for key in full or [(model, "", "")]:
            heading = MODEL_TITLES[model]
            if key in found:
                heading += f": {block_title(key, standards)[0]}"
            members = found.pop(key, {})
            higher = _above(spec, key, sources)
            words = condition_text(key, standards) if members else heading
            made.append(
                _block(spec, model, printed, heading, key[1], members, True, known, words, higher)
            )
    for key in sorted(found) if spec.others else ():
        heading = f"{MODEL_TITLES.get(key[0], key[0])}: {block_title(key, standards)[0]}"
        words, members = condition_text(key, standards), found[key]
        higher = _above(spec, key, sources)
        made.append(
            _block(spec, key[0], printed, heading, key[1], members, False, known, words, higher)
        )
    notes = [*NOTES, *dict.fromkeys(f"The paper (†): {entry.text}." for entry in known)]
    return made, notes, summarize_accuracy
