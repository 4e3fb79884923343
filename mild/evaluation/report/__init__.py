"""The report of an evaluation: one HTML page that holds everything it shows and asks nothing of any server."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mild.evaluation.gallery import ShownCase, ShownLayers
from mild.evaluation.report import leakage, pictures, tables
from mild.evaluation.summary import Summary


def render_report(
    summary: Summary, cases: Sequence[ShownCase], layers: Sequence[ShownLayers], chart: str | None
) -> str:
    """The page as HTML.

    Args:
        cases: what the gallery shows; their pictures are read and embedded.
        layers: pictures whose people can be switched on and off; read and embedded as well.
        chart: the adapters' loss curve, an ``<svg>`` element; None where there is none.
    """
    script = _text("report.js")
    of_datasets = tables.tables_of(summary)
    first = next((found[0] for found in of_datasets.values() if found), None)
    titles = {method.name: method.title for method in summary.methods}
    metrics = [metric for metric in summary.metrics if any(metric.name in v for c in cases for v in c.values.values())]
    own = summary.headline.method if summary.headline else ""
    spectra = [one for one in summary.spectra if one.pictures]
    environment = Environment(
        loader=PackageLoader("mild.evaluation.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        summary=summary,
        style=Markup(_text("report.css")),
        script=Markup(script),
        # Of the page's own script: nothing else runs, whatever stands in a name or a reason.
        script_digest=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        format=tables,
        first=first,
        of_datasets=of_datasets,
        ablations=tables.ablation_tables(first) if first else [],
        cases=[pictures.gallery_case(case, titles, metrics) for case in cases],
        layers=[pictures.layered_case(one) for one in layers],
        metrics=metrics,
        titles=titles,
        # Of an arm, its first method.
        own=next((method.name for method in summary.methods if own and own in (method.name, method.arm)), ""),
        metric_rows={metric.name: metric for metric in summary.metrics},
        longest=max((method.seconds or 0 for method in summary.methods), default=0),
        spectra=spectra,
        leakage=[leakage.leakage_part(one) for one in summary.leakage],
        gamma_chart=Markup(leakage.gamma_chart(summary.leakage, titles)) if summary.leakage else "",
        mass_chart=Markup(leakage.mass_chart(summary.leakage, titles)) if summary.leakage else "",
        spectrum_chart=Markup(leakage.spectrum_chart(spectra, titles)) if spectra else "",
        chart=Markup(chart) if chart else None,
        settings=json.dumps(summary.settings, indent=2, ensure_ascii=False),
    )


def _text(name: str) -> str:
    return (files("mild.evaluation.report") / name).read_text(encoding="utf-8")
