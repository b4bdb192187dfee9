"""Which hand-written CPU kernels there are, and how each is called. Owns the list; must not know TVM or the IR.

Every kernel is a frozen dataclass below `kernels/tir`; arguments in order, `member, team` (int32) always last. Pointers
are plain addresses; activations are dense and row-major; `rows`, `requests`, `width` are int32.

    Linear(k, n, dtype, out, bias, residual, act)                                                tir/linear.py
        x[rows,k] w(panel) [bias[n]] [residual[rows,n]] y[rows,n] turns | rows
        y = act(x @ w.T + bias) + residual
    LinearGlu(k, f, dtype, act, bias)                                                            tir/linear.py
        x[rows,k] w(glu panel) [bias[2*f]] y[rows,f] turns | rows       bias: gate then up, as in the checkpoint
    RmsNorm(n, dtype, eps, offset, weight)            x[rows,n] [w[n]] y[rows,n] | rows          tir/norms.py
    AddRmsNorm(n, dtype, eps, offset)                 x res w[n] y sum | rows                    tir/norms.py
    LayerNorm(n, dtype, eps, weight, bias)            x [w[n]] [b[n]] y | rows                   tir/norms.py
    Embedding(dim, dtype, layout)                     ids[rows] w y[rows,dim] | rows             tir/embedding.py
        layout "row" or "panel"; also gathers f32 rope tables by position (dtype "f32", layout "row")
    Rope(heads, dim, rotary, style, dtype)            x[rows,heads,dim] cos sin y | rows         tir/rope.py
        cos, sin f32[rows, rotary/2]
    KvWrite(kv)                                       kv k v pos seq table | rows width          tir/kv_append.py
    KvAppend(kv, q_heads, rotary, style, q_norm, k_norm, eps, offset)                            tir/kv_append.py
        kv qkv[rows, (q_heads+heads)*k_dim + heads*v_dim] pos[rows] seq[rows] table[requests,width]
        [cos sin if rotary] [qw[k_dim] if q_norm] [kw[k_dim] if k_norm] q[rows,q_heads,k_dim] | rows width
    Attend(kv, q_heads, scale, window, softcap, sinks, divide)                                   tir/attend.py
        kv q[rows,q_heads,k_dim] pos seq start[requests+1] table [sinks f32[q_heads]] out[rows,q_heads,v_dim]
        [parts f32[room], barrier if divide] turns | rows requests width [room]

`kv` is `KvLayout(dtype, heads, k_dim, v_dim)` (tir/kv_address.py) as a field, and as an argument the address of this
layer's page 0. `width` is the row length of `table`. `turns`: words by which members share work out (tir/turns.py).
Weight layouts are packed by `layouts.py`.

In-place: `y` of RmsNorm, LayerNorm, Rope and `sum` of AddRmsNorm may be the same memory as `x` (or `res`); `y` of
Linear may be the same memory as `residual`. No other overlap between an output and an input is allowed.
"""
