"""A small model as IR text: layers that are alike, with source lines, and enough work for every part of a report."""

from __future__ import annotations

HEAD = """xir 1 stage=graph
dim N in [1, 512]  // tokens in this step
dim B in [1, 16]  // requests in this step
dim S in [0, 16]  // rows of logits
dim P in [1, 4096]  // KV pages
assume N - B >= 0
"""

LAYER = """
  %nw{i} = param(name="model.layers.{i}.norm.weight") : bf16[64] {norm}
  %y{i} = nn.rms_norm(%x{i}, w=%nw{i}, eps=1e-06) : bf16[N, 64] {norm}
  %wq{i} = param(name="model.layers.{i}.q.weight") : bf16[64, 64] {attn}
  %wk{i} = param(name="model.layers.{i}.k.weight") : bf16[32, 64] {attn}
  %wv{i} = param(name="model.layers.{i}.v.weight") : bf16[32, 64] {attn}
  %q{i} = nn.linear(%y{i}, %wq{i}) : bf16[N, 64] {attn}
  %k{i} = nn.linear(%y{i}, %wk{i}) : bf16[N, 32] {attn}
  %v{i} = nn.linear(%y{i}, %wv{i}) : bf16[N, 32] {attn}
  %qh{i} = t.reshape(%q{i}, shape=[N, 4, 16]) : bf16[N, 4, 16] {attn}
  %kh{i} = t.reshape(%k{i}, shape=[N, 2, 16]) : bf16[N, 2, 16] {attn}
  %vh{i} = t.reshape(%v{i}, shape=[N, 2, 16]) : bf16[N, 2, 16] {attn}
  %cache{i} = kv.write(%kv{i}, %kh{i}, %vh{i}, %pos, %seq, %table) : {kv} {attn}
  %a{i} = kv.attend(%cache{i}, %qh{i}, %pos, %seq, %start, %table, scale=0.25) : bf16[N, 4, 16] {attn}
  %f{i} = t.reshape(%a{i}, shape=[N, 64]) : bf16[N, 64] {attn}
  %wo{i} = param(name="model.layers.{i}.o.weight") : bf16[64, 64] {attn}
  %o{i} = nn.linear(%f{i}, %wo{i}) : bf16[N, 64] {attn}
  %r{i} = t.add(%x{i}, %o{i}) : bf16[N, 64] {layer}
  %mw{i} = param(name="model.layers.{i}.mlp.norm.weight") : bf16[64] {mlp}
  %m{i} = nn.rms_norm(%r{i}, w=%mw{i}, eps=1e-06) : bf16[N, 64] {mlp}
  %wg{i} = param(name="model.layers.{i}.gate.weight") : bf16[160, 64] {mlp}
  %wu{i} = param(name="model.layers.{i}.up.weight") : bf16[160, 64] {mlp}
  %g{i} = nn.linear(%m{i}, %wg{i}) : bf16[N, 160] {mlp}
  %s{i} = t.silu(%g{i}) : bf16[N, 160] {mlp}
  %u{i} = nn.linear(%m{i}, %wu{i}) : bf16[N, 160] {mlp}
  %p{i} = t.mul(%s{i}, %u{i}) : bf16[N, 160] {mlp}
  %wd{i} = param(name="model.layers.{i}.down.weight") : bf16[64, 160] {mlp}
  %d{i} = nn.linear(%p{i}, %wd{i}) : bf16[N, 64] {mlp}
  %x{n} = t.add(%r{i}, %d{i}) : bf16[N, 64] {layer}"""

KV = "kv<bf16, heads=2, k=16, v=16, page=16>[P]"
PIPELINE = "fuse-glu,fuse-qkv,fuse-epilogue,fuse-add-norm,dce,assign-streams,plan-memory"


def model_text(layers: int = 3, file: str = "modeling_tiny.py") -> str:
    """A module of `layers` equal layers; `file` is the source that its locs name, as it stands in IR text."""

    def loc(line: int, path: str) -> str:
        return f'loc("{file}":{line}, "{path}")'

    args = [
        "%ids: i32[N]",
        "%pos: i32[N] in [0, 1023]",
        "%seq: i32[N]",
        "%start: i32[B + 1]",
        "%table: i32[B, 64]",
        "%sel: i32[S]",
    ]
    args += [f"%kv{i}: {KV}" for i in range(layers)]
    results = ["bf16[S, 384]"] + [f"{KV} alias %kv{i}" for i in range(layers)]
    lines = [HEAD, f"func @step({', '.join(args)}) -> ({', '.join(results)}) {{"]
    lines.append(f'  %table_w = param(name="model.embed.weight") : bf16[384, 64] {loc(5, "model.embed")}')
    lines.append(f"  %x0 = nn.embedding(%ids, %table_w) : bf16[N, 64] {loc(6, 'model.embed')}")
    for i in range(layers):
        at = f"model.layers.{i}"
        place = {
            "norm": loc(11, f"{at}.norm"),
            "attn": loc(20, f"{at}.attn"),
            "mlp": loc(33, f"{at}.mlp"),
            "layer": loc(40, at),
        }
        lines.append(LAYER.format(i=i, n=i + 1, kv=KV, **place).strip("\n"))
    lines.append(f"  %last = t.take(%x{layers}, %sel) : bf16[S, 64] {loc(50, 'model')}")
    lines.append(f"  %logits = nn.linear(%last, %table_w) : bf16[S, 384] {loc(51, 'lm_head')}")
    caches = "".join(f", %cache{i}" for i in range(layers))
    return "\n".join([*lines, f"  return %logits{caches}", "}"]) + "\n"


TWO_STREAMS = """xir 1 stage=graph
dim N in [1, 512]
group @tp size=4

func @step(%x: f32[N, 256], %z: f32[N, 256]) -> (f32[N, 256]) {
  %w = param(name="w") : f32[256, 256]
  %a = nn.linear(%x, %w, partial=@tp) : f32[N, 256] partial(@tp) loc("m.py":3, "model.layers.0")
  %f = comm.all_reduce_start(%a, group=@tp) : !future<f32[N, 256]> loc("m.py":4, "model.layers.0")
  %b = nn.linear(%z, %w) : f32[N, 256] loc("m.py":5, "model.layers.0")
  %c = comm.wait(%f) : f32[N, 256] loc("m.py":6, "model.layers.0")
  %y = t.add(%b, %c) : f32[N, 256] loc("m.py":7, "model.layers.0")
  return %y
}
"""
