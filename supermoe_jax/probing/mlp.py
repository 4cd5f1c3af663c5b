"""The MLP probe: trains the network that RecSys Challenge 2025 trained on the submitted user embeddings.

Shapes: n rows, D inputs, C outputs, S steps of B rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from supermoe_jax.probing.label_table import Label, LabelKind

BLOCKS = 3


@dataclasses.dataclass(frozen=True)
class MlpSettings:
  """Sizes and training settings of the network; calling an instance fits and predicts.

  The challenge used blocks of width 2,048 (`thin`) that widen to 4,096 (`wide`), AdamW at 1e-3, and 3 epochs over far
  more users. The defaults here suit thousands of labels, on which 3 epochs would be too few steps: at least 100 steps.
  Source: RecSys Challenge 2025: https://github.com/Synerise/recsys2025, `training_pipeline/model.py`; its constants as
  in https://github.com/sisinflab/FrameworkRecsys2025, `training_pipeline/constants.py`.
  """

  thin: int = 128
  wide: int = 256
  epochs: int = 3
  least_steps: int = 100
  batch: int = 128
  learning_rate: float = 1e-3
  weight_decay: float = 0.01

  def steps(self, rows: int) -> int:
    """Returns the number of training steps for `rows`, fitted and predicted ones together."""
    return max(self.least_steps, -(-self.epochs * rows // self.batch))

  def __call__(self, x: np.ndarray, label: Label, fit: np.ndarray, asked: np.ndarray, seed: int) -> np.ndarray:
    """Fits on the rows `fit` of `x [n, D]` and predicts the rows `asked [m]`: `[m]`, or `[m, C]` for classes.

    Inputs and numeric labels are standardised by the fitted rows alone. All folds of a label, and labels with about as
    many rows, share one compiled program.
    """
    if not isinstance(x, np.ndarray):
      raise TypeError("the MLP takes no sparse inputs")
    chosen = x[fit].astype(np.float64)
    mean, scale = chosen.mean(axis=0), chosen.std(axis=0)
    scale[scale < 1e-6 * np.maximum(1.0, np.abs(mean))] = 1.0  # a constant input stays near 0
    target = label.value[fit]
    shift, unit = (target.mean(), target.std() or 1.0) if label.kind == "regression" else (0.0, 1.0)
    room = _room(len(x))
    inputs = np.zeros((room, x.shape[1]), np.float32)
    inputs[: len(x)] = (x - mean) / scale
    y = np.zeros(room, np.float32)
    y[fit] = (target - shift) / unit
    size = self.steps(room), self.batch
    rng = np.random.default_rng(seed)
    rounds = -(-size[0] * size[1] // len(fit))
    order = np.concatenate([rng.permutation(fit) for _ in range(rounds)])[: size[0] * size[1]].reshape(size)
    program = _program(self, x.shape[1], label.outputs, label.kind)
    out = np.asarray(program(jax.random.key(seed), inputs, y, order.astype(np.int32)), np.float64)[asked]
    if label.kind == "multiclass":
      odds = np.exp(out - out.max(axis=1, keepdims=True))
      return np.asarray(odds / odds.sum(axis=1, keepdims=True))
    return np.asarray(out[:, 0] * unit + shift if label.kind == "regression" else 1 / (1 + np.exp(-out[:, 0])))


def _room(rows: int) -> int:
  """Returns the padded number of rows that a program is compiled for, so that similar numbers share a program.

  The padding is at most an eighth, or up to a multiple of 64.
  """
  step = max(64, 2 ** (rows.bit_length() - 4))
  return -(-rows // step) * step


class _Bottleneck(nnx.Module):
  """A residual block: layer norm, widening layer, GELU, narrowing layer."""

  def __init__(self, thin: int, wide: int, rngs: nnx.Rngs):
    self.norm = nnx.LayerNorm(thin, rngs=rngs)
    self.widen = nnx.Linear(thin, wide, rngs=rngs)
    self.narrow = nnx.Linear(wide, thin, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return x + self.narrow(nnx.gelu(self.widen(self.norm(x)), approximate=False))


class Network(nnx.Module):
  """A projection, three inverted bottlenecks with layer norms, and a linear output: `[B, D]` → `[B, C]`."""

  def __init__(self, width: int, outputs: int, thin: int, wide: int, *, rngs: nnx.Rngs):
    self.project = nnx.Linear(width, thin, rngs=rngs)
    self.norm_in = nnx.LayerNorm(thin, rngs=rngs)
    self.blocks = nnx.List([_Bottleneck(thin, wide, rngs) for _ in range(BLOCKS)])
    self.norm_out = nnx.LayerNorm(thin, rngs=rngs)
    self.out = nnx.Linear(thin, outputs, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns logits or numbers `[B, C]` for `x [B, D]`."""
    x = self.norm_in(self.project(x))
    for block in self.blocks:
      x = block(x)
    return self.out(self.norm_out(x))


Program = Callable[[jax.Array, np.ndarray, np.ndarray, np.ndarray], jax.Array]


@functools.lru_cache(maxsize=16)
def _program(mlp: MlpSettings, width: int, outputs: int, kind: LabelKind) -> Program:
  """Returns the compiled `(key, x [n, D], y [n], order [S, B]) → answers [n, C]`."""
  optimizer = optax.adamw(mlp.learning_rate, weight_decay=mlp.weight_decay)

  def run(key: jax.Array, x: jax.Array, y: jax.Array, order: jax.Array) -> jax.Array:
    graph, params = nnx.split(Network(width, outputs, mlp.thin, mlp.wide, rngs=nnx.Rngs(key)))

    def loss(params: nnx.State, rows: jax.Array) -> jax.Array:
      out = nnx.merge(graph, params)(x[rows])
      if kind == "binary":
        return optax.sigmoid_binary_cross_entropy(out[:, 0], y[rows]).mean()
      if kind == "multiclass":
        return optax.softmax_cross_entropy_with_integer_labels(out, y[rows].astype(jnp.int32)).mean()
      return optax.squared_error(out[:, 0], y[rows]).mean()

    def step(state: tuple[nnx.State, optax.OptState], rows: jax.Array) -> tuple[tuple[nnx.State, optax.OptState], None]:
      params, moments = state
      updates, moments = optimizer.update(jax.grad(loss)(params, rows), moments, params)
      return (optax.apply_updates(params, updates), moments), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), order)
    return nnx.merge(graph, params)(x)

  return jax.jit(run)
