"""Figures to hover over, for Optuna Dashboard."""

from plotly import graph_objects

from evosweep.core.events import SearchResult
from evosweep.tracking.artifacts.heatmap import level_table


def convergence(result: SearchResult) -> graph_objects.Figure:
    """Return validation KL of each generation's elite, over tokens scored."""
    steps = result.history()
    figure = graph_objects.Figure(
        graph_objects.Scatter(
            x=[step["tokens"] for step in steps],
            y=[step["kl"] for step in steps],
            line={"shape": "hv"},
            mode="lines+markers",
            text=[
                f"generation {step['generation']}<br>PPL {step['ppl']:.2f}<br>{step['bits_per_weight']:.3f} "
                f"bits a weight<br>{step['seconds']:.0f} s"
                for step in steps
            ],
        )
    )
    return figure.update_layout(
        title=f"{result.sampler}: validation KL by tokens scored",
        xaxis_title="tokens scored by the search",
        yaxis_title="validation KL (nats/token)",
    )


def levels(result: SearchResult) -> graph_objects.Figure:
    """Return the winner's levels: blocks across, layers down."""
    table, rows, blocks = level_table(result.problem, result.allocation)
    names = {(unit.kind, unit.block): result.allocation[unit.name] for unit in result.problem.units}
    text = [[names.get((row, block), "") for block in blocks] for row in rows]
    values = [[None if value != value else float(value) for value in line] for line in table]  # noqa: PLR0124 - NaN
    figure = graph_objects.Figure(
        graph_objects.Heatmap(
            z=values,
            x=blocks,
            y=rows,
            text=text,
            colorscale="Viridis",
            hovertemplate="block %{x}<br>%{y}<br>%{text}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed")
    return figure.update_layout(title=f"{result.sampler}: level of every layer", xaxis_title="block")


FIGURES = {"convergence": convergence, "levels": levels}
