"""Runs a GGUF in llama.cpp: <model.gguf> <tokens.npy> <logits.npy> [text]; prints what it found as JSON.

The structs are those of llama.h; what follows the fields that are set here is left as the library filled it in.
"""

import importlib.util
import json
import sys
from pathlib import Path

import cffi
import numpy as np

HEADER = """
typedef struct { void *devices; void *overrides; int32_t n_gpu_layers; char rest[256]; } model_params;
typedef struct {
    uint32_t n_ctx, n_batch, n_ubatch, n_seq_max, n_rs_seq, n_outputs_max, n_outputs_max_per_seq;
    int32_t n_threads, n_threads_batch;
    int32_t ctx_type, rope_scaling_type, pooling_type, attention_type, flash_attn_type;
    float rope[6]; uint32_t yarn_orig_ctx; float defrag_thold;
    void *cb_eval; void *cb_eval_user_data; int32_t type_k, type_v;
    char rest[256];
} context_params;
typedef struct {
    int32_t n_tokens; int32_t *token; float *embd; int32_t *pos; int32_t *n_seq_id; int32_t **seq_id; int8_t *logits;
} batch;
void llama_backend_init(void);
void llama_log_set(void *callback, void *data);
model_params llama_model_default_params(void);
context_params llama_context_default_params(void);
void *llama_model_load_from_file(const char *path, model_params params);
void *llama_init_from_model(void *model, context_params params);
batch llama_batch_init(int32_t tokens, int32_t embd, int32_t sequences);
int32_t llama_decode(void *context, batch batch);
float *llama_get_logits_ith(void *context, int32_t i);
const void *llama_model_get_vocab(void *model);
int32_t llama_vocab_n_tokens(const void *vocab);
const char *llama_model_chat_template(void *model, const char *name);
int32_t llama_tokenize(const void *vocab, const char *text, int32_t size, int32_t *tokens, int32_t most,
                       bool add_special, bool parse_special);
"""
F32 = 0


def library(ffi: cffi.FFI) -> object:
    """Returns the shared library with llama.cpp in it."""
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.origin is not None
    return ffi.dlopen(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))


class Llama:
    """A GGUF in llama.cpp, on the CPU.

    Args:
        path: The file.
        length: Tokens of a window at most.
    """

    def __init__(self, path: str, length: int) -> None:
        self.ffi = cffi.FFI()
        self.ffi.cdef(HEADER)
        self.lib = library(self.ffi)
        self.quiet = self.ffi.callback("void(int, const char *, void *)", lambda level, text, data: self._hear(text))
        self.said: list[str] = []
        self.lib.llama_log_set(self.quiet, self.ffi.NULL)
        self.lib.llama_backend_init()
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(path.encode(), params)
        assert self.model != self.ffi.NULL, "".join(self.said[-30:])
        context = self.lib.llama_context_default_params()
        assert (context.n_ctx, context.type_k, context.type_v) == (512, 1, 1), "llama.h has changed"
        context.n_ctx = context.n_batch = context.n_ubatch = max(length, 32)
        context.n_outputs_max = max(length, 32)
        context.n_threads = context.n_threads_batch = 1
        context.type_k = context.type_v = F32
        context.flash_attn_type = 0
        self.context = self.lib.llama_init_from_model(self.model, context)
        assert self.context != self.ffi.NULL, "".join(self.said[-30:])
        self.vocab = self.lib.llama_model_get_vocab(self.model)

    def _hear(self, text: object) -> None:
        self.said.append(self.ffi.string(text).decode(errors="replace"))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the logits after every token of a window, fp32, shape (tokens, vocabulary)."""
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place] = int(token)
            batch.pos[place] = place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = 1
        failed = self.lib.llama_decode(self.context, batch)
        assert not failed, "".join(self.said[-30:])
        size = self.lib.llama_vocab_n_tokens(self.vocab)
        rows = [self.ffi.buffer(self.lib.llama_get_logits_ith(self.context, i), 4 * size) for i in range(len(tokens))]
        return np.stack([np.frombuffer(row, dtype=np.float32).copy() for row in rows])

    def tokens(self, text: str) -> list[int]:
        """Returns the tokens of a text, special ones in it read as such, none added."""
        raw = text.encode()
        found = self.ffi.new("int32_t[]", len(raw) + 8)
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), found, len(raw) + 8, False, True)
        return list(found[0:count])

    def template(self) -> str:
        """Returns the chat template, empty if there is none."""
        found = self.lib.llama_model_chat_template(self.model, self.ffi.NULL)
        return "" if found == self.ffi.NULL else self.ffi.string(found).decode()


def main(path: str, tokens: str, out: str, *texts: str) -> None:
    """Writes the logits of one window."""
    ids = np.load(tokens)
    llama = Llama(path, len(ids))
    np.save(out, llama.logits(ids))
    warnings = [line.strip() for line in llama.said if "missing pre-tokenizer" in line or "GENERATION QUALITY" in line]
    facts = {"template": llama.template(), "tokens": [llama.tokens(text) for text in texts], "warnings": warnings}
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
