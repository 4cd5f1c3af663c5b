"""MoE layers of PyTorch libraries as `moe_layer.py --peers` times them; only that script imports this file."""

from __future__ import annotations

import os
from typing import Any

import jax
import moe_layer
import numpy as np
import st_moe_pytorch
import torch
from flax import nnx
from tqdm import tqdm
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from supermoe_jax.layers.moe import MoE


def measure(mesh: jax.sharding.Mesh, rounds: int, bar: tqdm) -> list[dict[str, Any]]:
  """Measures other libraries' layers beside this one, all with gated experts; returns a row for each.

  Raises:
    AssertionError: Mixtral's block with this layer's weights computes something else.
  """
  torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
  torch.manual_seed(0)
  size = moe_layer.Size(moe_layer.REFERENCE, 16)
  moe = MoE(size.d, size.hidden, size.experts, size.k, activation="swiglu", rngs=nnx.Rngs(0))
  x, valid, cotangent = moe_layer.inputs(size)
  given = torch.from_numpy(np.array(x)), torch.from_numpy(np.array(cotangent))
  expected = moe(x, valid, dropless=True).y
  st_moe = _st_moe(size)
  with torch.no_grad():
    sent = float(st_moe.gate(given[0])[0].round().sum())
  cases = {}
  with jax.set_mesh(mesh):
    for name in ("mlp", "sorted", "sorted, dropless"):
      cases[name] = moe_layer.case(name, size, mesh, "swiglu")
    cases["torch mlp"] = _case(_GatedMlp(size.d, size.k * size.hidden), *given)
    for implementation in ("eager", "grouped_mm"):
      block = _mixtral(size, moe, implementation)
      np.testing.assert_allclose(block(given[0]).detach().numpy(), expected, atol=1e-4)
      cases[f"Mixtral, {implementation}"] = _case(block, *given)._replace(dropped=0.0)
    cases["st-moe-pytorch"] = _case(st_moe, *given)._replace(dropped=1 - sent / (size.tokens * size.k))
    times = moe_layer.Times(cases, rounds, bar)
  return [{"tokens": size.tokens, "experts": size.experts} | times.row(name) for name in cases]


class _GatedMlp(torch.nn.Module):
  def __init__(self, d: int, hidden: int):
    super().__init__()
    self.gate_up = torch.nn.Linear(d, 2 * hidden, bias=False)
    self.down = torch.nn.Linear(hidden, d, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_up(x).chunk(2, dim=-1)
    return self.down(torch.nn.functional.silu(gate) * up)


def _mixtral(size: moe_layer.Size, moe: MoE, implementation: str) -> torch.nn.Module:
  """Hugging Face's block with the weights of `moe`; its products are a loop over experts, or one grouped product."""
  settings = {"num_local_experts": size.experts, "num_experts_per_tok": size.k}
  config = MixtralConfig(hidden_size=size.d, intermediate_size=size.hidden, **settings)
  config._experts_implementation = implementation
  block = MixtralSparseMoeBlock(config)
  gate, up, down = (np.array(getattr(moe, name)[...]) for name in ("gate", "up", "down"))
  with torch.no_grad():
    block.gate.weight.copy_(torch.from_numpy(np.array(moe.router.kernel[...]).T))
    block.experts.gate_up_proj.copy_(torch.from_numpy(np.concatenate([gate, up], axis=2)).transpose(1, 2))
    block.experts.down_proj.copy_(torch.from_numpy(down).transpose(1, 2))
  return block


def _st_moe(size: moe_layer.Size) -> torch.nn.Module:
  """One-hot dispatch by row of the batch; the capacity that it is told is for one choice, the hidden units for 1.5."""
  capacity = size.k * size.capacity_factor
  return st_moe_pytorch.MoE(
    size.d,
    num_experts=size.experts,
    gating_top_n=size.k,
    expert_hidden_mult=1.5 * size.hidden / size.d,
    capacity_factor_train=capacity,
    capacity_factor_eval=capacity,
    threshold_train=0.0,  # the second expert is never left out by chance
    threshold_eval=0.0,
  )


def _case(module: torch.nn.Module, x: torch.Tensor, cotangent: torch.Tensor) -> moe_layer.Case:
  x = x.clone().requires_grad_()
  parameters = [x, *module.parameters()]

  def run() -> tuple[torch.Tensor, Any]:
    out = module(x)
    return (out.outputs, out.total_aux_loss) if hasattr(out, "outputs") else (out, 0.0)

  def train() -> Any:
    y, aux = run()
    return y, torch.autograd.grad(torch.sum(y * cotangent) + aux, parameters)

  return moe_layer.Case(torch.no_grad()(run), train)
