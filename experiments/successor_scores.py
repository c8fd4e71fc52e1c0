"""Successor scores of all heads, by model: Monday to Tuesday, one to two (Gould et al. 2023).

Reproduces a figure of arXiv 2312.09230: in each model a few heads score far above the others, in every ordinal class.

    python -m workbench.experiments.successor_scores --model gpt2
    workbench sweep successor-scores --model demo gpt2 --weights trained random
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import workbench as wb
from workbench.experiments.inputs import Inputs, model_of, record_documents
from workbench.experiments.panels import groups
from workbench.figures.theme import CATEGORIES
from workbench.figures.themed import ThemedFigure
from workbench.probes import SuccessorHeads
from workbench.results.experiment import make_result

NAME = "successor-scores"


@dataclass(frozen=True)
class Config(Inputs):
    """Share of tokens that each head maps to their successor, computed from the weights alone."""

    rows: int = 256
    """Maximum number of tokens to record. The recording identifies the model and holds its unembedding."""
    space: Literal["with", "without", "both"] = "with"
    """Members with a leading space, without it, or both."""
    case: Literal["listed", "lower", "both"] = "listed"
    """Members as listed (days, months and letters capitalised), in lower case, or both."""
    permutations: int = 1000
    """Number of shuffles of the successors within their class, for the null."""

    def __post_init__(self) -> None:
        super().__post_init__()
        SuccessorHeads(space=self.space, case=self.case, permutations=self.permutations)


def run(config: Config) -> wb.Result:
    """Returns one line per head: macro score, the mean over tasks, 0 to 1; its null under shuffles; p over heads."""
    model = model_of(config.model, config.weights, config.device)
    store = record_documents(config, (f"resid_post.{model.site_map.n_layers - 1}",))
    settings = {"space": config.space, "case": config.case, "permutations": config.permutations, "seed": config.seed}
    result = SuccessorHeads(row_limit=0, device=config.device, **settings).run(store, model=model)
    names = ["macro", "micro", "tasks_above", "copying", "null_macro", "p_value", "p_family"]
    table = result.data[names].to_dataframe().reset_index()
    table["tasks"] = result.data.sizes["task"]
    return make_result(NAME, config, table, store, data=result.data)


def headline(result: wb.Result) -> str:
    """Returns the scores of the best head as a sentence."""
    best = result.table.loc[result.table["macro"].idxmax()]
    finding = "Best head" if best["p_family"] <= 0.05 else "No successor head; best head"
    return (
        f"{finding} L{best['layer']}H{best['head']}: macro score {best['macro']:.2f}, "
        f"shuffled {best['null_macro']:.2f}, p = {best['p_family']:.2g} over heads; above 0.5 in "
        f"{best['tasks_above']:.0f} of {best['tasks']:.0f} classes."
    )


def figures(result: wb.Result) -> dict[str, Any]:
    """Returns "heads": the macro score of every head, one column per model and setting, filled where p < 0.05."""
    figure = ThemedFigure()
    in_legend = set()
    columns = groups(result, ())
    names = [name.replace(", ", "<br>") for name, _ in columns]
    for place, (_, part) in enumerate(columns):
        heads = part.groupby(["layer", "head"], as_index=False).agg(
            macro=("macro", "mean"), p_family=("p_family", "mean")
        )
        last = int(heads["head"].to_numpy().max())
        for certain in (True, False):
            points = heads.loc[(heads["p_family"] < 0.05) == certain]
            if not len(points):
                continue
            figure.add_scatter(
                x=place + _aside(points["head"], last),
                y=points["macro"],
                mode="markers",
                marker={"symbol": "circle" if certain else "circle-open", "size": 8, "color": CATEGORIES[0]},
                name="p < 0.05 over all heads" if certain else "p ≥ 0.05",
                legendgroup=str(certain),
                showlegend=certain not in in_legend,
                customdata=[f"L{layer}H{head}" for layer, head in zip(points["layer"], points["head"], strict=True)],
                hovertemplate="head %{customdata}: %{y:.3f}<extra></extra>",
            )
            in_legend.add(certain)
        best = heads.loc[heads["macro"].idxmax()]
        figure.add_annotation(
            x=place + _aside(best["head"], last),
            y=best["macro"],
            text=f"L{best['layer']:.0f}H{best['head']:.0f}",
            showarrow=False,
            yshift=14,
        )
    figure.update_layout(
        title={
            "text": "Successor heads",
            "subtitle": {"text": "share of tokens mapped to their successor, mean over classes; one point per head"},
        },
        width=max(640, 160 + 130 * len(names)),
        height=480,
        margin={"t": 110},
    )
    figure.update_xaxes(
        tickvals=list(range(len(names))), ticktext=names, showgrid=False, range=[-0.5, len(names) - 0.5]
    )
    figure.update_yaxes(title="macro successor score", range=[-0.03, 1.1])
    return {"heads": figure}


def _aside(head: Any, last: int) -> Any:
    """Returns offsets that spread the heads over half of a column."""
    return 0.5 * (head + 0.5) / (last + 1) - 0.25


if __name__ == "__main__":
    from workbench.cli.main import run_experiment

    run_experiment(NAME)
