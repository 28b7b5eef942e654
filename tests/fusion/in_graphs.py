"""What stands in a network's graphs once they are rewritten."""

from __future__ import annotations

import copy

import torch

from fused_attn import functional
from fused_attn.fusion.changing import calls
from fused_attn.fusion.changing.graphs import rewrite
from fused_attn.reference import block_attention

OWN = (functional.__name__, calls.__name__, block_attention.__name__)


def own_calls(graph):
    """Names of our calls in a graph."""
    return [n.target.__name__ for n in graph.nodes if str(getattr(n.target, "__module__", "")) in OWN]


def compiled(net, found, *, dynamic=None, **options):
    """A copy of it whose graphs are rewritten and run as they are. found: gets the names of our calls in each."""

    def counted(graph, inputs):
        rewrite(graph, inputs, **options)
        found.append(own_calls(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(copy.deepcopy(net), backend=counted, dynamic=dynamic)
