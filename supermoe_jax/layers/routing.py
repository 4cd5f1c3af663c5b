"""Routes tokens in a Mixture-of-Experts layer: chooses K of E experts for each token, and their weights."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import sharding


class BalanceBias(nnx.Variable):
  """Bias added to experts' probabilities when experts are chosen. It is not a parameter: `rebalanced` updates it."""


class Aux(NamedTuple):
  """Scalars that a training loss may contain, float32, over the valid tokens of the whole batch on every device.

  Attributes:
    balance_loss: `E · Σ_e stop_grad(load_e) · mean probability_e`; 1 when experts are used equally, E when one takes
      all (K = 1).
    z_loss: mean squared log-partition of the logits.
    mutual_information: between task and expert, in nats, over the tokens that have a task; training should raise it. In
      [0, log min(T, E)]; 0 without tasks.
  """

  balance_loss: jax.Array
  z_loss: jax.Array
  mutual_information: jax.Array


class RoutingSums(NamedTuple):
  """Sums over the valid tokens of a batch on every device, float32; the sums of parts of a batch add up.

  Attributes:
    tokens: the number of tokens.
    probability: `[E]`, Σ p.
    chosen: `[E]`, the choices of each expert; no gradient.
    log_partition: Σ of the squared log-partition of the logits.
    entropy: Σ of the entropy of p, in nats; no gradient.
    joint: `[T, E]`, Σ p over the tokens of each task; `[0, E]` without tasks.
  """

  tokens: jax.Array
  probability: jax.Array
  chosen: jax.Array
  log_partition: jax.Array
  entropy: jax.Array
  joint: jax.Array

  @property
  def load(self) -> jax.Array:
    """Returns each expert's share of the choices, `[..., E]`; sums to 1 (0 without tokens)."""
    return self.chosen / jnp.maximum(jnp.sum(self.chosen, axis=-1, keepdims=True), 1.0)

  @property
  def mean_entropy(self) -> jax.Array:
    """Returns the mean entropy of a token's probabilities; log E when all experts are equally probable."""
    return self.entropy / jnp.maximum(self.tokens, 1.0)


class Routing(NamedTuple):
  """Decisions of a router for tokens `[...]`.

  Attributes:
    expert: int32 `[..., K]`, the chosen experts, all different.
    weight: float32 `[..., K]`, the weights that combine their outputs.
    aux: see `Aux`.
    sums: see `RoutingSums`.
  """

  expert: jax.Array
  weight: jax.Array
  aux: Aux
  sums: RoutingSums


class Router(nnx.Module):
  """Router that chooses K of E experts for each token by the top-K of a softmax. All arithmetic is float32.

  With K ≥ 2 the chosen probabilities are renormalised. With K = 1 the probability itself is the weight, since a
  renormalised single choice is always 1 and would give the router no gradient.

  Source: top-K gating, arXiv 1701.06538; balance loss and jitter, arXiv 2101.03961; z-loss, arXiv 2202.08906; balancing
  bias, arXiv 2408.15664; mutual information of task and expert, arXiv 2212.08066.
  """

  def __init__(
    self,
    d_model: int,
    experts: int,
    k: int,
    *,
    tasks: int = 0,
    jitter: float = 0.0,
    balance_bias: bool = False,
    renormalise: bool | None = None,
    rngs: nnx.Rngs,
  ):
    """Creates the router.

    Args:
      d_model: D.
      experts: E.
      k: K.
      tasks: T; the router adds learned logits `[T, E]`, 0 at first, for the task of a token. 0: it sees no task.
      jitter: in training, the router's inputs are multiplied by noise from [1 - jitter, 1 + jitter].
      balance_bias: adds a bias to the probabilities for the choice, never for the weights; `rebalanced` updates it.
      renormalise: make the K weights sum to 1; None: if K ≥ 2.
      rngs: keys of the initial kernel.

    Raises:
      ValueError: `k` is not in [1, experts]; `renormalise` with `k=1`; `jitter` is not in [0, 1).
    """
    if not 1 <= k <= experts:
      raise ValueError(f"k={k} must be between 1 and experts={experts}")
    if renormalise and k == 1:
      raise ValueError("renormalise=True with k=1 makes every weight 1: the router would get no gradient; leave it out")
    if not 0 <= jitter < 1:
      raise ValueError(f"jitter={jitter} must be in [0, 1)")
    self.experts, self.k, self.tasks, self.jitter = experts, k, tasks, jitter
    self.renormalise = k > 1 if renormalise is None else renormalise
    self.kernel = sharding.param(jax.random.normal(rngs.params(), (d_model, experts)) * 0.02, "embed", None)
    self.task_kernel = sharding.param(jnp.zeros((tasks, experts)), None, None) if tasks else None
    self.balance_bias = BalanceBias(jnp.zeros(experts), logical=(None,)) if balance_bias else None

  def __call__(
    self, x: jax.Array, valid: jax.Array, task: jax.Array | None = None, *, rngs: nnx.Rngs | None = None
  ) -> Routing:
    """Routes `x [..., D]`. Tokens where `valid [...]` is False are never counted, and the dispatch never sends them.

    Args:
      x: tokens, of any float type.
      valid: bool.
      task: int32 `[...]`, the task of each token; -1, or anything else outside [0, T), for a token without one. None:
        no token has a task.
      rngs: if given, jitter is on.

    Raises:
      ValueError: `task` is given to a router without tasks.
    """
    if task is not None and not self.tasks:
      raise ValueError("this router sees no task; create it with tasks=T")
    x = jnp.where(valid[..., None], x, 0).astype(jnp.float32)  # padding, NaN included, affects nothing
    if self.jitter and rngs is not None:
      x = x * jax.random.uniform(rngs.jitter(), x.shape, minval=1 - self.jitter, maxval=1 + self.jitter)
    logits = _matmul(x, self.kernel.get_value())
    c = None
    if task is not None and self.task_kernel is not None:
      c = jax.nn.one_hot(task, self.tasks)
      logits += _matmul(c, self.task_kernel.get_value())
    probability = jax.nn.softmax(logits, axis=-1)
    bias = 0.0 if self.balance_bias is None else jax.lax.stop_gradient(self.balance_bias.get_value())
    expert = self._choose(jax.lax.stop_gradient(probability) + bias)
    chosen = jax.nn.one_hot(expert, self.experts, dtype=jnp.float32)
    # The renormalised weights are the softmax over the chosen logits. The quotient of probabilities would be 0 / 0
    # where a bias chooses experts of probability 0.
    chosen_logits = jnp.sum(chosen * logits[..., None, :], axis=-1)
    weight = jax.nn.softmax(chosen_logits, axis=-1)
    if not self.renormalise:
      weight = jnp.sum(chosen * probability[..., None, :], axis=-1)
    sums = count_tokens(logits, jnp.sum(chosen, axis=-2), valid, c)
    return Routing(expert, weight, auxiliary(sums), sums)

  def _choose(self, score: jax.Array) -> jax.Array:
    """Returns the K best of `score [..., E]`, device by device: XLA would gather all tokens on some devices to sort."""
    names = ("batch", *(None,) * (score.ndim - 1))
    return sharding.on_shards(lambda s: jax.lax.top_k(s, self.k)[1].astype(jnp.int32), (names,), names, score)


def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns a product whose factors stay float32 on every backend; by default a TPU would round them to bfloat16."""
  return jnp.matmul(x, kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def count_tokens(logits: jax.Array, chosen: jax.Array, valid: jax.Array, task: jax.Array | None = None) -> RoutingSums:
  """Returns the sums of `RoutingSums` over the valid tokens of the whole (global) batch.

  Shapes: `logits, chosen [..., E]` (1 for a token's K experts), `valid [...]`, `task [..., T]` one-hot (0: no task).
  """
  tokens = tuple(range(valid.ndim))
  there = valid[..., None]
  probability = jnp.where(there, jax.nn.softmax(logits, axis=-1), 0.0)
  entropy = -jnp.sum(probability * jax.nn.log_softmax(logits, axis=-1), axis=-1)
  c = jnp.zeros((*valid.shape, 0)) if task is None else jnp.where(there, task, 0.0)
  return RoutingSums(
    tokens=jnp.sum(valid, dtype=jnp.float32),
    probability=jnp.sum(probability, axis=tokens),
    chosen=jax.lax.stop_gradient(jnp.sum(jnp.where(there, chosen, 0.0), axis=tokens)),
    log_partition=jnp.sum(jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) ** 2, 0.0)),
    entropy=jax.lax.stop_gradient(jnp.sum(jnp.where(valid, entropy, 0.0))),
    joint=jnp.sum(c[..., :, None] * probability[..., None, :], axis=tokens),
  )


def auxiliary(sums: RoutingSums) -> Aux:
  """Returns the terms for the loss of one layer, from its sums.

  The balance term is `E · Σ_e load_e · mean probability_e`, over the batch: within a device experts may specialise. The
  information is `Σ_t π_t KL(P_t ‖ Σ_s π_s P_s)`: of the tokens with a task, π_t is the share of task t, and P_t their
  mean probability.
  """
  some = jnp.maximum(sums.tokens, 1.0)
  balance = sums.probability.shape[-1] * jnp.sum(sums.load * sums.probability) / some
  joint = sums.joint / jnp.maximum(jax.lax.stop_gradient(jnp.sum(sums.joint)), 1.0)
  independent = jnp.sum(joint, axis=1, keepdims=True) * jnp.sum(joint, axis=0)
  ratio = jnp.where(joint > 0, joint, 1.0) / jnp.where(joint > 0, independent, 1.0)
  return Aux(balance, sums.log_partition / some, jnp.sum(joint * jnp.log(ratio)))


def rebalanced(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
  """Returns the balancing bias after a step: up by `rate` for experts below the mean load, down for experts above it.

  Shapes: `bias, load [..., E]`; `load` must be the load of the global batch.

  Source: loss-free balancing, arXiv 2408.15664.
  """
  return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
