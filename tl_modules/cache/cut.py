"""Cuts a backbone in two where its closed stages end, so that what is frozen runs once and not in every epoch.

    x -> [ closed: a function of x alone, nothing in it moves ] -> boundary -> [ open stages ] -> features

The cut goes through the graph of `forward`, which torch.fx records: all that depends on no open stage is on the left,
skip connections and the operations between modules included. Only the modules that hold both closed and open parts are
looked into; every other one stays whole, with its train or eval mode. Those are in eval mode as long as anything is
closed (`FineTuning.apply`), so that what their forward would draw in training, e.g. the layers that LayerDrop leaves
out, cannot be in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from tl_modules.backbones.base import Backbone

Boundary = tuple[Tensor, ...]


class NotCut(Exception):
    """A backbone cannot be cut here; its text says why."""


@dataclass
class Cut:
    """Both sides of a backbone; they share its modules.

    Attributes:
        closed: After how many stages.
        trunk: x (B, ...) -> the boundary, one or several tensors of B rows each.
        tail: These tensors -> features (B, out_features).
    """

    closed: int
    trunk: nn.Module
    tail: Callable[..., Tensor]


def cut(backbone: Backbone, closed: int) -> Cut:
    """Cuts after the first `closed` stages.

    Args:
        backbone: Not moved to another device afterwards.
        closed: How many of its stages, from the input, are closed; at least one.

    Raises:
        NotCut: Its `forward` cannot be recorded.
    """
    stages = backbone.stages()
    if closed == len(stages):
        return Cut(closed, backbone, lambda features: features)
    graph = _graph(backbone, closed)
    open_nodes = _open_nodes(backbone, graph, closed)
    border = [
        node
        for node in graph.nodes
        if node not in open_nodes and node.op != "get_attr" and any(user in open_nodes for user in node.users)
    ]
    if not open_nodes or any(node.op == "placeholder" for node in border):
        raise NotCut("its open stages read the input itself")
    trunk = _part(backbone, graph, [n for n in graph.nodes if n not in open_nodes], [], border)
    tail = _part(backbone, graph, [n for n in graph.nodes if n in open_nodes or n.op == "get_attr"], border, None)
    if backbone._compiled_call_impl is not None:  # by --compile, which reaches only a call of the whole
        tail.compile()
    return Cut(closed, trunk, tail)


def run_trunk(cut: Cut, x: Tensor) -> Boundary:
    """The boundary of a batch."""
    boundary = cut.trunk(x)
    return boundary if isinstance(boundary, tuple) else (boundary,)


def check(cut: Cut, backbone: Backbone, x: Tensor, boundary: Boundary) -> None:
    """Compares with the whole on a batch in eval mode.

    Raises:
        NotCut: The boundary is not a row per sample, or the parts do not give what the whole does.
    """
    if not all(isinstance(part, Tensor) and part.ndim > 0 and len(part) == len(x) for part in boundary):
        raise NotCut("what passes between its stages is not a tensor with a row per sample")
    # half of the batch, so that a cut which has remembered the batch's size shows
    half = (len(x) + 1) // 2
    tolerance = 1e-5 if all(part.dtype == torch.float32 for part in boundary) else 1e-2
    given = cut.tail(*(part[:half] for part in boundary))
    if not torch.allclose(given, backbone(x[:half]), tolerance, 10 * tolerance):
        raise NotCut("its parts do not give what the whole does")


class _Skeleton(fx.Tracer):
    """Records only the modules named; all others are single nodes."""

    def __init__(self, mixed: set[nn.Module]) -> None:
        super().__init__()
        self.mixed = mixed

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.mixed


def _graph(backbone: Backbone, closed: int) -> fx.Graph:
    stages = backbone.stages()
    sides = [{id(p) for stage in part for p in stage.parameters()} for part in (stages[:closed], stages[closed:])]
    mixed = {m for m in backbone.modules() if all(any(id(p) in side for p in m.parameters()) for side in sides)}
    modes = {m: m.training for m in mixed}
    try:
        for module in mixed:
            module.training = False
        with torch.random.fork_rng():  # some forwards draw whether they are in training or not
            return _Skeleton(mixed).trace(backbone)
    except Exception as error:  # fx raises whatever a forward does with a stand-in for a tensor
        raise NotCut(f"torch.fx cannot record its forward ({str(error).splitlines()[0][:80]})") from error
    finally:
        for module, training in modes.items():
            module.training = training


def _open_nodes(backbone: Backbone, graph: fx.Graph, closed: int) -> set[fx.Node]:
    """The nodes that depend on an open stage; a module of no stage counts as one."""
    stages = backbone.stages()
    resting = {id(m) for stage in stages[:closed] for m in stage.modules()}
    moving = {id(p) for stage in stages[closed:] for p in stage.parameters()}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        target = str(node.target)
        own = (node.op == "call_module" and id(backbone.get_submodule(target)) not in resting) or (
            node.op == "get_attr" and id(_attribute(backbone, target)) in moving
        )
        if own or node.op == "output" or any(before in found for before in node.all_input_nodes):
            found.add(node)
    return found


def _attribute(module: nn.Module, path: str) -> object:
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)


def _part(
    backbone: Backbone, graph: fx.Graph, nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node] | None
) -> fx.GraphModule:
    """The graph of some nodes; without `outputs` it ends where the whole does."""
    part = fx.Graph()
    copies = {node: part.placeholder(f"boundary_{number}") for number, node in enumerate(inputs)}
    for node in nodes:
        copies[node] = part.node_copy(node, lambda old: copies[old])
    if outputs is not None:
        part.output(tuple(copies[node] for node in outputs))
    module = fx.GraphModule(backbone, part)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module
