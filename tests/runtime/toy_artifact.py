"""A runnable artifact without a compiler: the toy of fake_executor.py in C, behind the interface that real code has."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from xllm_compiler.artifact import FORMAT, DimRange, Limits, Manifest, Model, Target, Weight, Weights
from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.artifact.writer import ArtifactWriter
from xllm_compiler.step.abi import ArgumentBlock
from xllm_compiler.step.interface import Function, Program, State, TensorSpec

VOCAB, PAGE, WIDTH, MULTIPLIER = 50, 4, 8, 7
WEIGHT_BYTES = 4096

CODE = r"""
#include <pthread.h>
#include <stdint.h>
#include <stddef.h>
typedef int32_t (*step_t)(const int64_t *, int32_t, int32_t);
/* Zeroes are a free lock and empty queues; `team` is at 140, where the runtime writes it. */
typedef struct {
    pthread_mutex_t lock; pthread_cond_t news, finished;
    int32_t epoch, team; step_t step; const int64_t *args; int32_t done, status, stop;
} ctx_t;
_Static_assert(offsetof(ctx_t, team) == 140 && sizeof(ctx_t) <= 192, "layout");

int32_t xllm_team_join(ctx_t *c, int32_t member) {
    int32_t seen = 0;
    for (;;) {
        pthread_mutex_lock(&c->lock);
        while (c->epoch == seen && !c->stop) pthread_cond_wait(&c->news, &c->lock);
        if (c->stop) { pthread_mutex_unlock(&c->lock); return 0; }
        seen = c->epoch;
        pthread_mutex_unlock(&c->lock);
        int32_t result = c->step(c->args, member, c->team);
        pthread_mutex_lock(&c->lock);
        if (result) c->status = result;
        c->done++;
        pthread_cond_signal(&c->finished);
        pthread_mutex_unlock(&c->lock);
    }
}
int32_t xllm_team_run(ctx_t *c, void *code, const int64_t *values) {
    pthread_mutex_lock(&c->lock);
    c->step = (step_t)code; c->args = values; c->done = c->status = 0; c->epoch++;
    pthread_cond_broadcast(&c->news);
    pthread_mutex_unlock(&c->lock);
    int32_t mine = c->step(values, 0, c->team);
    pthread_mutex_lock(&c->lock);
    while (c->done < c->team - 1) pthread_cond_wait(&c->finished, &c->lock);
    int32_t theirs = c->status;
    pthread_mutex_unlock(&c->lock);
    return mine ? mine : theirs;
}
int32_t xllm_team_stop(ctx_t *c) {
    pthread_mutex_lock(&c->lock); c->stop = 1; pthread_cond_broadcast(&c->news); pthread_mutex_unlock(&c->lock);
    return 0;
}

/* The words' places are step.abi's, as macros. */
static int32_t toy(const int64_t *a, int32_t member, int32_t size, int32_t name) {
    const int32_t *ids = (void *)a[AT_ids], *pos = (void *)a[AT_pos], *seq = (void *)a[AT_seq];
    const int32_t *table = (void *)a[AT_table], *sel = (void *)a[AT_sel];
    int32_t *arena = (void *)a[AT_arena], *kv = (void *)a[AT_kv0], *weights = (void *)a[AT_weights];
    float *logits = (void *)a[AT_logits];
    if (a[AT_weights] % 64 || a[AT_barrier] % 64 || *(int64_t *)a[AT_barrier]) return 100;
    if (member) return 0;
    if (ids[0] == VOCAB - 1) return 7;
    arena[0] = size; arena[1] = name; arena[a[AT_N] + 15] = 1;
    for (int64_t n = 0; n < a[AT_N]; n++) {
        int32_t page = table[seq[n] * WIDTH + pos[n] / PAGE];
        if (page < 0 || page >= a[AT_P]) return 8;
        kv[page * PAGE + pos[n] % PAGE] = ids[n];
    }
    for (int64_t s = 0; s < a[AT_S]; s++) {
        int32_t n = sel[s]; int64_t state = 0;
        for (int32_t p = 0; p <= pos[n]; p++) {
            int32_t token = kv[table[seq[n] * WIDTH + p / PAGE] * PAGE + p % PAGE];
            state = (state * 31 + token + weights[0]) % 1000003;
        }
        logits[s * VOCAB + VOCAB - 1] = -1000;  /* the refused token is never the answer */
        for (int32_t v = 0; v < VOCAB - 1; v++) logits[s * VOCAB + v] = (float)((state * (v + 3)) % 101) - 50;
    }
    return 0;
}
int32_t xllm_fn_step_1(const int64_t *a, int32_t m, int32_t t) { return toy(a, m, t, 1); }
int32_t xllm_fn_step(const int64_t *a, int32_t m, int32_t t) { return toy(a, m, t, 2); }
"""

STEP_FUNCTION = Function(
    inputs=(
        TensorSpec("ids", "i32", ("N",)),
        TensorSpec("pos", "i32", ("N",)),
        TensorSpec("seq", "i32", ("N",)),
        TensorSpec("start", "i32", ("B + 1",)),
        TensorSpec("table", "i32", ("B", str(WIDTH))),
        TensorSpec("sel", "i32", ("S",)),
    ),
    outputs=(TensorSpec("logits", "f32", ("S", str(VOCAB))),),
    states=("kv0",),
    programs=(
        Program("xllm_fn_step_1", ("3 - N",), "4*N + 64"),
        Program("xllm_fn_step", (), "4*N + 64"),
    ),
)
DIMS = {
    "N": DimRange(1, 12, "tokens in this step"),
    "B": DimRange(1, 3, "requests"),
    "S": DimRange(0, 6, "sampled rows"),
    "P": DimRange(1, 1 << 24, "pages"),
}

MODULE = f"""xir 1 stage=buf
dim N in [1, 12]
dim B in [1, 3]
dim S in [0, 6]
dim P in [1, {1 << 24}]

func @step(
    %ids: i32[N],
    %pos: i32[N],
    %seq: i32[N],
    %start: i32[B + 1],
    %table: i32[B, {WIDTH}],
    %sel: i32[S],
    %kv0: kv<bf16, heads=1, k=1, v=1, page={PAGE}>[P]
) -> (logits: f32[S, {VOCAB}]) arena(4*N + 64) {{
"""
"""As much of it as a start reads."""


def toy_answer(prompt: list[int], count: int) -> list[int]:
    """The greedy answer of the C code above, by plain recursion."""
    tokens = list(prompt)
    for _ in range(count):
        state = 0
        for token in tokens:
            state = (state * 31 + token + MULTIPLIER) % 1000003
        row = [(state * (v + 3)) % 101 for v in range(VOCAB - 1)]
        tokens.append(row.index(max(row)))
    return tokens[len(prompt) :]


def toy_manifest(isa: str) -> Manifest:
    return Manifest(
        format=FORMAT,
        id="",
        model=Model("Toy", "toy", VOCAB, 8, 1, "f32", WIDTH * PAGE, (), None, None),
        target=Target("cpu", (isa,), ("calls.json", f"cpu/{isa}.so")),
        limits=Limits(3, 12, 6),
        dims=DIMS,
        states={"kv0": State("kv", "bf16", "tile1", {"heads": 1, "k": 1, "v": 1, "page": PAGE}, "P", 4 * PAGE)},
        functions={"step": STEP_FUNCTION},
        weights=Weights(WEIGHT_BYTES, (Weight("w", "row", "f32", (WEIGHT_BYTES // 4,), 0, WEIGHT_BYTES),)),
        files={},
        key={},
    )


def build_toy_artifact(out: Path) -> Path:
    """Write it at `out`. Skips the test where there is no C compiler, or a machine without any known level."""
    compiler = shutil.which("cc")
    if compiler is None or not machine_isas():
        pytest.skip("needs a C compiler and an x86-64 machine")
    manifest = toy_manifest(machine_isas()[0])
    source = out.with_suffix(".c")
    source.write_text(CODE)
    library = out.with_suffix(".so")
    words = ArgumentBlock.of(STEP_FUNCTION, DIMS).words
    defines = [f"-DVOCAB={VOCAB}", f"-DPAGE={PAGE}", f"-DWIDTH={WIDTH}"]
    defines += [f"-DAT_{name or space}={place}" for place, (space, name) in enumerate(words)]
    command = [compiler, "-O1", "-shared", "-fPIC", "-pthread", "-w", *defines, str(source), "-o", str(library)]
    subprocess.run(command, check=True, timeout=60)
    with ArtifactWriter(out) as writer:
        writer.write_text("module.xir", MODULE)
        writer.write_text("calls.json", "{}\n")  # nobody profiles the toy
        (writer.path / "weights.bin").write_bytes(MULTIPLIER.to_bytes(4, "little") + bytes(WEIGHT_BYTES - 4))
        writer.copy(f"cpu/{manifest.target.levels[0]}.so", library)
        writer.write_text("generation_config.json", '{"temperature": 0.5, "do_sample": true, "max_new_tokens": 3}')
        writer.commit(manifest)
    return out
