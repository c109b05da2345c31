"""A report as one HTML file that needs nothing else: no scripts, fonts, images or network."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote

from augment_cli.reporting.markup import DASH, TIMES, Markup, join, minus, tag
from augment_cli.reporting.network import network_figure
from augment_cli.reporting.numbers import Change, Limit, Report, SkippedGroup
from augment_cli.reporting.provenance import TRUST_TERMS
from augment_cli.reporting.sites_table import sites_tables
from augment_cli.reporting.units import (
    amount,
    counted,
    describe_latency,
    duration,
    error,
    percent,
    share,
    signed_amount,
    signed_duration,
    span,
)

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def to_html(report: Report) -> str:
    """The report as a page, light or dark as the reader's system, for screens of any width and for paper."""
    parts = (_notices, _cards, _network, _totals, _sites, _skipped, _commands)
    main = tag("main", (part(report) for part in parts))
    return page(f"{report.model} with {report.recipe.name}", _header(report), main, _footer(report))


def page(title: str, *body: Markup | None, policy: str = _POLICY, style: str = "") -> str:
    """A page of its own around a header, a main part and a footer: augment's style sheet, with `style` after it."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8") + style
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("title", title),
        tag("style", Markup(style)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', *body), lang='en')}\n"


def _header(report: Report) -> Markup:
    height_width = f"{report.input_size[1]} {TIMES} {report.input_size[2]}"
    return tag(
        "header",
        tag("p", "augment-cli report" if report.source_sha256 else "augment-cli plan", class_="eyebrow"),
        tag("h1", report.model, " ", tag("span", report.recipe.name, class_="chip")),
        tag(
            "p",
            tag("b", f"{len(report.sites)} of {counted(report.convolutions, 'convolution')} replaced"),
            f": {report.becomes}, for images of ",
            tag("span", height_width, "."),
            (tag("br"), report.recipe.sentence) if report.recipe.description else None,
            class_="lead",
        ),
    )


def _cards(report: Report) -> Markup:
    flops = f"{amount(report.flops.after)} FLOPs, 2 {TIMES} multiply-adds"
    cards = [
        _change_card("Parameters", report.params, minus(f"{report.params.delta:+,}")),
        _change_card("Multiply-adds", report.macs, flops),
        _card("Sites replaced", f"{len(report.sites):,}", f"of {report.convolutions:,}", "convolutions"),
        _budget_card(report),
    ]
    if report.inheritance:
        shares = span(
            (site.inheritance.share for site in report.sites if site.inheritance), lambda n: share(n, digits=0)
        )
        kinds = ", ".join(f"{number} {kind}" for kind, number in report.inheritance.items() if number)
        cards.append(_card("Kept of the source", shares.replace("-", DASH), None, f"of filter importance; {kinds}"))
    if report.fidelity:
        below = f"of {report.fidelity.images:,} held-out images, KL {report.fidelity.divergence:.4f} nats"
        cards.append(_card("Agrees with the source", share(report.fidelity.agreement), None, below))
    return tag("dl", cards, class_="cards")


def _card(title: str, big: str, beside: str | Markup | None, below: str) -> Markup:
    small = tag("small", beside) if beside else None
    return tag(
        "div", tag("dt", title), tag("dd", big, small, class_="big"), tag("dd", below, class_="sub"), class_="card"
    )


def _change_card(title: str, change: Change, below: str) -> Markup:
    beside = tag("span", minus(percent(change.percent)), class_=change.direction)
    return _card(title, amount(change.after), beside, f"from {amount(change.before)}; {below}")


def _budget_card(report: Report) -> Markup:
    """The tightest of the budgets, by the share of it that is left."""
    limits = {"parameters": report.params_limit, "multiply-adds": report.macs_limit, "time": report.latency_limit}
    name, limit = min(limits.items(), key=lambda item: item[1].share_left)
    if limit.most is None or limit.left is None:
        return _card("Budget", "free", None, "no limit was asked for")
    under = "those of the source" if limit.asked == "keep" else minus(limit.asked) if "%" in limit.asked else "a limit"
    left, most = f"{limit.left:,}", amount(limit.most)
    if name == "time":
        left, most = duration(limit.left), duration(limit.most)
    return _card("Budget left", minus(left), None, f"{name}, under {under}: {most}")


def _notices(report: Report) -> Iterator[Markup]:
    """What a reader must know before the first prediction."""
    if report.weights and report.weights.startswith("random"):
        yield tag("p", tag("b", "Not trained."), f" The source's weights are {report.weights}.", class_="notice")
    if report.exact:
        text = "As converted, every site computes exactly what its source does: nothing was given up."
        yield tag("p", text, class_="notice good")
    elif report.error is not None:
        text = (
            " Attention was fitted to the filters that it replaces: error is its mean squared error over their variance"
        )
        text += f", {error(report.error)} on average on images held out of the fit."
        yield tag("p", tag("b", "Fitted."), text, class_="notice")
    else:
        changed = sum(1 for site in report.sites if site.given_up)
        where = f" at {changed} of {len(report.sites)} sites" if changed < len(report.sites) else ""
        text = f" The attention that replaces filters{where} is untrained as converted."
        yield tag("p", tag("b", "Fine-tune before use."), text, class_="notice")


def _network(report: Report) -> Markup:
    title = f"The convolutions of {report.model} by map size"
    note = "A band for each size of the output map, a bar for each convolution."
    pointing = tag("span", " Point at one for its name and numbers.", class_="pointing")
    return tag(
        "section",
        tag("h2", "Where in the network"),
        tag("p", note, pointing, class_="quiet"),
        network_figure(report.marks, title),
    )


_TOTALS = ("Count", "Before", "After", "Change", "%", "Budget", "At most", "Left")


def _totals(report: Report) -> Markup:
    rows: list[tuple[str, Change, Callable[[int], str], Callable[[int], str], Limit | None]] = [
        ("Parameters", report.params, "{:,}".format, "{:+,}".format, report.params_limit),
        ("Multiply-adds", report.macs, amount, signed_amount, report.macs_limit),
        ("FLOPs", report.flops, amount, signed_amount, None),
    ]
    if report.latency:
        rows.append(("Predicted time", report.latency, duration, signed_duration, report.latency_limit))
    if report.measured_latency:
        rows.append(("Measured time", report.measured_latency, duration, signed_duration, None))
    body = (_total(*row) for row in rows)
    table = tag(
        "table",
        tag("caption", "Parameters, multiply-adds and FLOPs of the whole model"),
        tag("thead", tag("tr", (tag("th", title, scope="col") for title in _TOTALS))),
        tag("tbody", body),
        class_="stack",
    )
    shape = f" {TIMES} ".join(map(str, report.input_size))
    note = f"Multiply-adds of one image of {shape}; FLOPs = 2 {TIMES} multiply-adds."
    return tag(
        "section",
        tag("h2", "The whole model"),
        tag("p", note, _ratios(report), _latency(report), class_="quiet"),
        scroll(table, "The whole model"),
    )


def _total(
    title: str, change: Change, show: Callable[[int], str], show_signed: Callable[[int], str], limit: Limit | None
) -> Markup:
    budget = ["", "", ""]
    if limit:
        budget = [limit.asked, *(DASH if number is None else show(number) for number in (limit.most, limit.left))]
    cells: list[tuple[str, str | None]] = [
        (show(change.before), None),
        (show(change.after), "after"),
        (show_signed(change.delta), None),
        (percent(change.percent), change.direction),
        *((text, None) for text in budget),
    ]
    labelled = zip(_TOTALS[1:], cells, strict=True)
    return tag(
        "tr",
        tag("th", title, scope="row"),
        (tag("td", minus(text), class_=style, data_label=label) for label, (text, style) in labelled),
    )


def _ratios(report: Report) -> Markup | None:
    if not report.ratios:
        return None
    attained = ", ".join(f"{name} {ratio.overall:.3f}" for name, ratio in report.ratios.items())
    return join((tag("br"), f"Attained by all sites together, as ratios to the output channels: {attained}."))


def _latency(report: Report) -> Markup | None:
    return join((tag("br"), f"Latency {describe_latency(report.timed)}.")) if report.timed else None


def _sites(report: Report) -> Markup:
    legend = " ".join((f"Map is the height {TIMES} width of the output.", *report.legend))
    return tag(
        "section",
        tag("h2", counted(len(report.sites), "site")),
        tag("p", legend, class_="quiet"),
        sites_tables(report),
    )


def scroll(table: Markup, label: str) -> Markup:
    """A table that scrolls inside the page where it is too wide, by keyboard too."""
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=label)


def _skipped(report: Report) -> Markup | None:
    if not report.skipped:
        return None
    number = sum(len(group.names) for group in report.skipped)
    title = counted(number, "convolution stays as it is", "convolutions stay as they are")
    return tag("section", tag("h2", title), tag("div", map(_reason, report.skipped), class_="reasons"))


def _reason(group: SkippedGroup) -> Markup:
    names = join((", " if i else "", tag("code", name)) for i, name in enumerate(group.names))
    return tag(
        "details",
        tag("summary", tag("b", len(group.names)), group.reason),
        tag("p", names, class_="names"),
    )


def _commands(report: Report) -> Markup | None:
    """Commands for this very file, to be given in the folder that holds it."""
    if report.file is None:
        return None
    names = {"FILE": quote(report.file), "NAME": quote(Path(report.file).stem)}
    if report.source_sha256 is None:
        listings = [["augment convert --plan FILE -o NAME"]]
    else:
        base = "" if report.base == "timm" else ", base=make_source"
        listings = [
            ["augment finetune FILE --data FOLDER --epochs 30 -o NAME-tuned", "augment export FILE -o NAME.onnx"],
            ["import augment_cli", f"model = augment_cli.load({report.file!r}{base})"],
        ]
    listings[0] = [re.sub("FILE|NAME", lambda word: names[word.group()], line) for line in listings[0]]
    code = (tag("pre", (tag("code", line) for line in lines)) for lines in listings)
    where = "In the folder that holds it, with augment-cli installed."
    return tag("section", tag("h2", "Use ", tag("code", report.file)), tag("p", where, class_="quiet"), code)


def _footer(report: Report) -> Markup:
    recipe = report.recipe
    entries = [
        ("Recipe", f"{recipe.name} ({recipe.status})"),
        ("Recipe SHA-256", recipe.sha256),
        ("Plan SHA-256", report.plan_sha256),
        ("Model arguments", ", ".join(f"{key}={value}" for key, value in report.model_args.items())),
        ("Source weights", report.weights),
        ("Source SHA-256", report.source_sha256),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    if paper := recipe.paper:
        entries[1:1] = [("Paper", paper.title), ("Table", paper.table), ("Trust", paper.trust)]
        entries[4:4] = [("Words of trust", TRUST_TERMS)]
    shown = ((tag("dt", title), tag("dd", text)) for title, text in entries if text)
    return tag("footer", tag("h2", "Where this comes from"), tag("dl", shown))
