"""Text on the report page: a paragraph coloured by KL, and continuations side by side."""

import html

import numpy as np

from evosweep.core.events import SearchResult

VERMILION = "213,94,0"  # of Okabe and Ito's colours
LEAST = 0.5  # nats, drawn as the full colour where no token loses more


def coloured(result: SearchResult) -> list[str]:
    """Return a paragraph of held-out text twice, uniform and found, each token coloured by its KL."""
    text = result.paragraph
    if not text:
        return []
    full = max(LEAST, float(np.percentile([*text["uniform"], *text["found"]], 95)))
    blocks = [
        "<h2>Token by token</h2>"
        "<p>Held-out text of median KL; the darker a token, the further its prediction is from the dense model's "
        f"(KL in nats, full colour from {full:.2f}; a figure shows under the pointer).</p>"
    ]
    for side in ("uniform", "found"):
        spans = (
            f"<span title='{kl:.3f}' style='background:rgba({VERMILION},{min(kl / full, 1):.2f})'>"
            f"{html.escape(piece)}</span>"
            for piece, kl in zip(text["tokens"], text[side], strict=True)
        )
        mean = float(np.mean(text[side]))
        blocks.append(f"<h3>{side}, mean {mean:.3f}</h3><p class=tokens>{''.join(spans)}</p>")
    return blocks


def continuations(result: SearchResult) -> list[str]:
    """Return for each prompt a table of its continuations."""
    if not result.continuations:
        return []
    blocks = ["<h2>In its own words</h2><p>Greedy continuations; a sample to read, not a measurement.</p>"]
    for prompt, answers in result.continuations.items():
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td style='text-align:left'>{html.escape(text)}</td></tr>"
            for name, text in answers.items()
        )
        blocks.append(f"<h3>{html.escape(prompt)}</h3><div class=wide><table>{rows}</table></div>")
    return blocks
