"""The step in JAX, as its users write it: jax.numpy and lax, one `jit` over both updates, NHWC. The child process.

    python -m bench.peers.jax_step IN.npz OUT.npz

`bench.peers.jax_peer` writes IN and judges OUT; no torch here, so that the device's memory is left to JAX. It computes
what `dcgan.step.ReferenceStep` computes: D on real and on fake with a batch's own statistics each, BCE of logits, Adam,
then G through the updated D; D takes no weight gradient in G's step, since nothing asks `vjp` for it.

IN.npz: `settings` (JSON: the `layers` of both networks as `kernels.geometry.Layer`'s fields, `precision`, `rounds`,
`seconds`), `start/g/NAME` and `start/d/NAME` (state dicts, PyTorch's shapes), `real/i` (N, C, H, W) and `z/i` (N, nz),
all float32. OUT.npz: `metrics` (steps, 5), `moments/g/NAME` (Adam's first moments after the first step) and
`end/g/NAME` (state dicts after the last), likewise for d. The last line of stdout is JSON: the times, or `why` not.
"""

import json
import sys
import time
from functools import partial
from typing import Any

import numpy as np

LEARNING_RATE, BETA1, BETA2, ADAM_EPS = 2e-4, 0.5, 0.999, 1e-8
BN_EPS, BN_MOMENTUM, SLOPE = 1e-5, 0.1, 0.2
SHORTEST_S, FEWEST_ROUNDS, MOST_CALLS = 5e-3, 3, 200
DIMENSIONS = ("NHWC", "HWIO", "NHWC")

Network = list[dict[str, Any]]
"""A dict a layer: parameters (`weight` HWIO, `scale`, `shift`), or statistics (`mean`, `var`, `count`)."""


def from_torch(layers: list[dict], state: dict[str, np.ndarray]) -> tuple[Network, Network]:
    """Parameters and statistics of a network from its state dict."""
    params, stats, index = [], [], 0
    for layer in layers:
        weight = state[f"main.{index}.weight"]
        # PyTorch's (out, in, R, S) as HWIO, and its transposed (in, out, R, S) as what `transpose_kernel` takes.
        own, seen = {"weight": weight.transpose(2, 3, 1, 0)}, {}
        if layer["batch_norm"]:
            batch_norm = f"main.{index + 1}."
            own |= {"scale": state[batch_norm + "weight"], "shift": state[batch_norm + "bias"]}
            seen = {"mean": state[batch_norm + "running_mean"], "var": state[batch_norm + "running_var"]}
            seen["count"] = np.asarray(state[batch_norm + "num_batches_tracked"], np.int32)
        params.append(own)
        stats.append(seen)
        index += 1 + layer["batch_norm"] + (layer["activation"] != "none")
    return params, stats


def to_torch(layers: list[dict], params: Network, stats: Network) -> dict[str, np.ndarray]:
    """The state dict again; without statistics where `stats` has none."""
    state, index = {}, 0
    for layer, own, seen in zip(layers, params, stats or [{}] * len(layers), strict=True):
        state[f"main.{index}.weight"] = np.asarray(own["weight"]).transpose(3, 2, 0, 1)
        if layer["batch_norm"]:
            names = {"weight": own["scale"], "bias": own["shift"]}
            if seen:
                names |= {
                    "running_mean": seen["mean"],
                    "running_var": seen["var"],
                    "num_batches_tracked": seen["count"],
                }
            state |= {f"main.{index + 1}.{name}": np.asarray(value) for name, value in names.items()}
        index += 1 + layer["batch_norm"] + (layer["activation"] != "none")
    return state


def forward(layers: list[dict], dtype, params: Network, stats: Network, x):
    """NHWC maps through a network, products in `dtype`, statistics in float32: the output and the new statistics."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    updated = []
    for layer, own, seen in zip(layers, params, stats, strict=True):
        kernel, stride, padding = layer["kernel"], layer["stride"], layer["padding"]
        x, weight = x.astype(dtype), own["weight"].astype(dtype)
        if layer["kind"] == "conv":
            pads = [(padding, padding)] * 2
            x = lax.conv_general_dilated(x, weight, (stride, stride), pads, dimension_numbers=DIMENSIONS)
        else:
            pads = [(kernel - 1 - padding,) * 2] * 2
            x = lax.conv_transpose(
                x, weight, (stride, stride), pads, dimension_numbers=DIMENSIONS, transpose_kernel=True
            )
        if layer["batch_norm"]:
            maps, count = x.astype(jnp.float32), x.size // x.shape[-1]
            mean = maps.mean((0, 1, 2))
            var = jnp.square(maps - mean).mean((0, 1, 2))
            x = ((maps - mean) * lax.rsqrt(var + BN_EPS) * own["scale"] + own["shift"]).astype(dtype)
            news = {"mean": mean, "var": var * (count / max(count - 1, 1))}  # running_var takes the unbiased variance
            moved = {name: (1 - BN_MOMENTUM) * seen[name] + BN_MOMENTUM * new for name, new in news.items()}
            seen = moved | {"count": seen["count"] + 1}
        if layer["activation"] == "relu":
            x = jax.nn.relu(x)
        elif layer["activation"] == "leaky_relu":
            x = jax.nn.leaky_relu(x, SLOPE)
        elif layer["activation"] == "tanh":
            x = jnp.tanh(x)
        updated.append(seen)
    return x, updated


def adam(params: Network, moments: tuple[Network, Network], gradients: Network, step):
    """PyTorch's Adam: new parameters and moments; `step` counts from 1."""
    import jax
    import jax.numpy as jnp

    first = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, moments[0], gradients)
    second = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, moments[1], gradients)
    rate, correction = LEARNING_RATE / (1 - BETA1**step), jnp.sqrt(1 - BETA2**step)

    def move(p, m, v):
        return p - rate * m / (jnp.sqrt(v) / correction + ADAM_EPS)

    return jax.tree.map(move, params, first, second), (first, second)


def train_step(layers: dict[str, list[dict]], dtype, state: dict, real, z):
    """One update of both networks: real (N, H, W, C), z (N, nz) → the new state and `dcgan.step.METRICS` (5,)."""
    import jax
    import jax.numpy as jnp

    g, d, count = state["g"], state["d"], state["step"] + 1

    def bce(logits, is_real: bool):
        return jax.nn.softplus(-logits if is_real else logits).mean()

    def discriminate(params, stats, images):
        logits, stats = forward(layers["d"], dtype, params, stats, images)
        return logits.astype(jnp.float32).reshape(-1), stats

    def loss_d(params):
        on_real, stats = discriminate(params, d["stats"], real)
        on_fake, stats = discriminate(params, stats, fake)
        means = jax.nn.sigmoid(on_real).mean(), jax.nn.sigmoid(on_fake).mean()
        return bce(on_real, True) + bce(on_fake, False), (stats, means)

    def loss_g(images):
        logits, stats = discriminate(params_d, stats_d, images)
        return bce(logits, True), (stats, jax.nn.sigmoid(logits).mean())

    generate = partial(forward, layers["g"], dtype, stats=g["stats"], x=z[:, None, None, :])
    fake, pull, stats_g = jax.vjp(lambda params: generate(params=params), g["params"], has_aux=True)
    (value_d, (stats_d, means)), gradients = jax.value_and_grad(loss_d, has_aux=True)(d["params"])
    params_d, moments_d = adam(d["params"], d["moments"], gradients, count)
    (value_g, (stats_d, after)), by_images = jax.value_and_grad(loss_g, has_aux=True)(fake)
    params_g, moments_g = adam(g["params"], g["moments"], pull(by_images)[0], count)
    new = {
        "g": {"params": params_g, "stats": stats_g, "moments": moments_g},
        "d": {"params": params_d, "stats": stats_d, "moments": moments_d},
        "step": count,
    }
    return new, jnp.stack([value_d, value_g, *means, after])


def quantiles_ms(call, rounds: int, seconds: float) -> dict[str, float]:
    """p20, p50 and p80 of one `call`, in milliseconds: each round enough calls in a row, one wait at its end."""
    began = time.perf_counter()
    call().block_until_ready()
    once_s = time.perf_counter() - began
    calls = min(max(1, round(SHORTEST_S / max(once_s, 1e-9))), MOST_CALLS)
    values = []
    while len(values) < rounds and (len(values) < FEWEST_ROUNDS or time.perf_counter() - began < seconds):
        start = time.perf_counter()
        for _ in range(calls):
            last = call()
        last.block_until_ready()
        values.append((time.perf_counter() - start) * 1e3 / calls)
    return {f"p{q}_ms": float(np.quantile(values, q / 100)) for q in (20, 50, 80)} | {"rounds": len(values)}


def run(arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict]:
    """Train on the batches of IN.npz, then time: OUT.npz's arrays, and the figures."""
    import jax
    import jax.numpy as jnp

    settings = json.loads(str(arrays["settings"]))
    layers, images = settings["layers"], arrays["real/0"].shape[0]
    dtype = jnp.bfloat16 if settings["precision"] == "bf16" else jnp.float32
    state: dict[str, Any] = {"step": jnp.zeros((), jnp.int32)}
    for key in ("g", "d"):
        prefix = f"start/{key}/"
        start = {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}
        params, stats = jax.tree.map(jnp.asarray, from_torch(layers[key], start))
        zeros = jax.tree.map(jnp.zeros_like, (params, params))
        state[key] = {"params": params, "stats": stats, "moments": zeros}
    count = sum(name.startswith("real/") for name in arrays)
    batches = [
        (jnp.asarray(arrays[f"real/{i}"].transpose(0, 2, 3, 1)), jnp.asarray(arrays[f"z/{i}"])) for i in range(count)
    ]
    step = jax.jit(partial(train_step, layers, dtype), donate_argnums=0)

    began = time.perf_counter()
    step = step.lower(state, *batches[0]).compile()
    compile_s = time.perf_counter() - began
    metrics, found = [], {}
    for i, batch in enumerate(batches):
        state, values = step(state, *batch)
        metrics.append(np.asarray(values))
        for key in () if i else ("g", "d"):
            first = to_torch(layers[key], state[key]["moments"][0], [])
            found |= {f"moments/{key}/{name}": value for name, value in first.items()}
    for key in ("g", "d"):
        end = to_torch(layers[key], state[key]["params"], state[key]["stats"])
        found |= {f"end/{key}/{name}": value for name, value in end.items()}
    found["metrics"] = np.stack(metrics)

    turn = 0

    def call():
        nonlocal state, turn
        state, values = step(state, *batches[turn % len(batches)])
        turn += 1
        return values

    figures = quantiles_ms(call, settings["rounds"], settings["seconds"] - compile_s)
    finite = bool(np.isfinite(np.asarray(call())).all())
    device = jax.devices()[0]
    memory = getattr(device, "memory_stats", dict)() or {}
    figures |= {
        "images_per_s": images * 1e3 / figures["p50_ms"],
        "compile_s": compile_s,
        "peak_memory_bytes": memory.get("peak_bytes_in_use"),
        "jax": jax.__version__,
        "platform": device.platform,
    }
    return found, figures | ({} if finite else {"why": "metrics after timing are not finite"})


def main(argv: list[str]) -> int:
    source, target = argv
    try:
        import jax
    except ImportError as error:
        print(json.dumps({"missing": f"JAX is not installed ({error})"}))
        return 0
    try:
        jax.devices()
    except RuntimeError as error:
        print(json.dumps({"missing": f"JAX finds no such device ({str(error).splitlines()[0]})"[:200]}))
        return 0
    try:
        with np.load(source, allow_pickle=False) as file:
            found, figures = run(dict(file))
        np.savez(target, **found)
    except Exception as error:  # whatever XLA raises is the row's reason
        lines = str(error).strip().splitlines() or [""]
        figures = {"why": f"{type(error).__name__}: {lines[0]}"[:200]}
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
