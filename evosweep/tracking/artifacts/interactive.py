"""Figures to hover over, for Optuna Dashboard."""

from plotly import graph_objects

from evosweep.core.events import SearchResult
from evosweep.tracking.artifacts.heatmap import level_table
from evosweep.tracking.palette import level_styles, listed


def convergence(result: SearchResult) -> graph_objects.Figure:
    """Return validation KL of each generation's elite, over tokens scored; the exported winner is marked."""
    steps = result.history()
    figure = graph_objects.Figure(
        graph_objects.Scatter(
            x=[step["tokens"] for step in steps],
            y=[step["kl"] for step in steps],
            line={"shape": "hv"},
            mode="lines+markers",
            name="elite",
            text=[
                f"generation {step['generation']}<br>PPL {step['ppl']:.2f}<br>{step['bits_per_weight']:.3f} "
                f"bits a weight<br>{step['seconds']:.0f} s"
                for step in steps
            ],
        )
    )
    winner = steps[result.winner_generation]
    figure.add_scatter(
        x=[winner["tokens"]],
        y=[winner["kl"]],
        mode="markers",
        marker={"size": 14, "symbol": "star", "color": "crimson"},
        name="exported (validation never selects)",
    )
    return figure.update_layout(
        title=f"{result.sampler}: validation KL by tokens scored",
        xaxis_title="tokens scored by the search",
        yaxis_title="validation KL (nats/token)",
        legend={"orientation": "h", "y": -0.25},
    )


def levels(result: SearchResult) -> graph_objects.Figure:
    """Return the winner's levels: blocks across, layers down, one colour a level."""
    names, rows, blocks = level_table(result.problem, result.allocation)
    styles = level_styles(result.problem)
    order = {name: index for index, name in enumerate(styles)}
    count = len(styles)
    scale = [
        [edge, style.hex]
        for index, style in enumerate(styles.values())
        for edge in (index / count, (index + 1) / count)
    ]
    ticks = listed(list(styles.values()))
    figure = graph_objects.Figure(
        graph_objects.Heatmap(
            z=[[order[name] if name else None for name in line] for line in names],
            x=blocks,
            y=rows,
            zmin=-0.5,
            zmax=count - 0.5,
            text=[[styles[name].label if name else "" for name in line] for line in names],
            customdata=names,
            texttemplate="%{text}",
            colorscale=scale,
            colorbar={"tickvals": [order[style.name] for style in ticks], "ticktext": [style.name for style in ticks]},
            hovertemplate="block %{x}<br>%{y}<br>%{customdata}<extra></extra>",
            xgap=1,
            ygap=1,
        )
    )
    figure.update_xaxes(tickvals=blocks[:: max(1, len(blocks) // 15)])
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure.update_layout(title=f"{result.sampler}: level of every layer", xaxis_title="block")


FIGURES = {"convergence": convergence, "levels": levels}
