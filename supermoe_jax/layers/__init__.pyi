from supermoe_jax.layers.attention import Attention as Attention
from supermoe_jax.layers.moe import Mlp as Mlp
from supermoe_jax.layers.moe import MoE as MoE
from supermoe_jax.layers.routing import Router as Router
from supermoe_jax.layers.table import EmbeddingTable as EmbeddingTable
from supermoe_jax.layers.transformer import Block as Block
from supermoe_jax.layers.transformer import Stack as Stack
