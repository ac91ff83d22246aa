"""Text: how the dense model, the uniform allocation and the winner continue the same prompts."""

from pathlib import Path

from evosweep.core.events import SearchResult


class Continuations:
    """Continuations side by side, a section a prompt."""

    def __call__(self, result: SearchResult, folder: Path) -> None:
        """Write ``continuations.md``; nothing where no prompts were given."""
        if not result.continuations:
            return
        lines = ["Greedy, the same prompt for all; a sample to read, not a measurement.", ""]
        for prompt, answers in result.continuations.items():
            lines += [f"## {prompt}", ""]
            for name, text in answers.items():
                lines += [f"**{name}**", "", *(f"> {line}" for line in text.splitlines() or [""]), ""]
        (folder / "continuations.md").write_text("\n".join(lines), encoding="utf-8")
