"""The tokenizer of a GGUF: that of the file which a model came from, or what a fast tokenizer is made of."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from evosweep.core.errors import ExportError
from evosweep.models.load import LoadedModel

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
PATTERNS = {
    ENDINGS + WORDS + r"\p{N}{1,3}" + REST: "llama-bpe",
    ENDINGS + WORDS + r"\p{N}" + REST: "qwen2",
}
"""llama.cpp's names of rules that split text before merges, by the regular expression that tokenizer.json has."""


def add_tokenizer(writer: gguf.GGUFWriter, loaded: LoadedModel, folder: Path, *, pre: str, vocabulary: int) -> None:
    """Write tokens, merges, special tokens and the chat template.

    Args:
        writer: Of the file.
        loaded: The model.
        folder: Has the tokenizer as transformers saves it.
        pre: llama.cpp's name of the rule that splits text before merges; ``auto`` finds it.
        vocabulary: Rows of the embedding.

    Raises:
        ExportError: The tokenizer is of a kind that llama.cpp does not have, or the rule is not known.
    """
    source = loaded.source.path if loaded.source is not None else None
    if source is not None and source.is_file():
        _copy(writer, source)
        return
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ExportError("the tokenizer has no tokenizer.json: llama.cpp's cannot be made of it")
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    if tokenizer["model"].get("type") != "BPE":
        raise ExportError(f"llama.cpp's tokenizer cannot be made of one of the type {tokenizer['model'].get('type')}")
    fallback = bool(tokenizer["model"].get("byte_fallback"))
    _add_tokens(writer, tokenizer, vocabulary, ranks=fallback)
    writer.add_tokenizer_model("llama" if fallback else "gpt2")
    writer.add_tokenizer_pre("default" if fallback else rule_name(tokenizer) if pre == "auto" else pre)
    special = gguf.SpecialVocab(folder, load_merges=not fallback, n_vocab=vocabulary)
    if (
        not fallback and not special.merges
    ):  # a tokenizer of bytes; llama.cpp wants a list, and gguf writes no empty one
        first = tokenizer["model"]["vocab"]
        special.merges = [" ".join([next(iter(first))] * 2)]  # what it makes is no token, so that it is taken apart
    special.add_to_gguf(writer, quiet=True)


def rule_name(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the rule that splits text before merges.

    Args:
        tokenizer: What is in tokenizer.json.

    Raises:
        ExportError: It is none of the known ones.
    """
    rule = tokenizer.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers", [rule])
    kinds = [step.get("type") for step in steps]
    if tokenizer.get("normalizer") is None and kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        found = PATTERNS.get(steps[0]["pattern"].get("Regex", ""))
        if found is not None:
            return found
    raise ExportError(
        f"llama.cpp's name of the rule by which the tokenizer splits text ({', '.join(map(str, kinds))}) is not known: "
        "set export.pre_tokenizer to it (gpt-2, llama-bpe, qwen2, smollm ...)"
    )


def _copy(writer: gguf.GGUFWriter, source: Path) -> None:
    """Write everything that a GGUF says of its tokenizer."""
    for name, field in gguf.GGUFReader(source).fields.items():
        if name.startswith("tokenizer."):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)


def _add_tokens(writer: gguf.GGUFWriter, tokenizer: Mapping[str, Any], vocabulary: int, *, ranks: bool) -> None:
    """Write every token and its kind; rows of the embedding without one are unused.

    Args:
        writer: Of the file.
        tokenizer: What is in tokenizer.json.
        vocabulary: Rows of the embedding.
        ranks: Whether tokens have scores: the sooner one comes, the higher.
    """
    tokens = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for index, token in tokens.items():
        if ranks and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[index] = gguf.TokenType.BYTE
    for added in tokenizer.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if tokens and max(tokens) >= vocabulary:
        raise ExportError(f"the tokenizer has {max(tokens) + 1} tokens, the embedding {vocabulary} rows")
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(vocabulary)])
    writer.add_token_types([kinds.get(index, gguf.TokenType.UNUSED) for index in range(vocabulary)])
    if ranks:
        writer.add_token_scores([-float(index) for index in range(vocabulary)])
