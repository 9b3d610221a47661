"""Attention between the tokens of a patch and the expression around it.

Letters in shapes: B patches, T superpixels of a patch, K HR points of its context, D width.
"""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor, nn

from method.network import Network

WIDTH = Network.embedding_size  # D, 128 as published
HEADS = 8  # as published


def one_product(first: nn.Linear, second: nn.Linear, x: Tensor) -> Tensor:
    """second(first(x)); the matrices are multiplied before, for x has many more rows than they."""
    bias = nnf.linear(first.bias, second.weight, second.bias)
    return nnf.linear(x, second.weight @ first.weight, bias)


class CrossAttention(nn.Module):
    """Queries (B, Q, .) attend to keys (B, M, .) in several heads and come back as (B, Q, D)."""

    def __init__(self, query_dim: int, key_dim: int, scale: float) -> None:
        super().__init__()
        self.query = nn.Linear(query_dim, WIDTH)
        self.key = nn.Linear(key_dim, WIDTH)
        self.value = nn.Linear(key_dim, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.scale = scale

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        return self.out(self.mixed(self.query(queries), keys))

    def mixed(self, queries: Tensor, keys: Tensor) -> Tensor:
        """What the heads find, (B, Q, D), for queries as these see them."""

        def heads(x: Tensor) -> Tensor:  # (B, M, D) -> (B, heads, M, D / heads)
            return x.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)

        q, k, v = heads(queries), heads(self.key(keys)), heads(self.value(keys))
        mixed = nnf.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return mixed.transpose(1, 2).flatten(2)


class BidirectionalAttention(nn.Module):
    """Tokens look at expression, expression at tokens, then the first at the second: (B, T, D)."""

    def __init__(self, token_dim: int, expression_dim: int, scale: float) -> None:
        super().__init__()
        self.token_to_expression = CrossAttention(token_dim, expression_dim, scale)
        self.expression_to_token = CrossAttention(expression_dim, token_dim, scale)
        self.fuse = CrossAttention(WIDTH, WIDTH, scale)

    def forward(self, tokens: Tensor, expression: Tensor) -> Tensor:
        first, last = self.token_to_expression, self.fuse
        informed_tokens = first.mixed(first.query(tokens), expression)  # (B, T, D)
        informed_expression = self.expression_to_token(expression, tokens)  # (B, K, D)
        queries = one_product(first.out, last.query, informed_tokens)
        return last.out(last.mixed(queries, informed_expression))
