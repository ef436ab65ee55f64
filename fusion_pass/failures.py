"""What happens when the pass itself fails: the graph is as it was, and the user is told.

A user's model must compile whatever is wrong here. Each graph is remembered before it is changed; an exception restores it, and
a warning names the stage, the site and how to report it. With ``strict=True`` the exception is raised, the graph restored too.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from torch import fx

log = logging.getLogger("fusion_pass")

_HOW_TO_REPORT = (
    "This is a defect of fusion-pass, not of your model: the graph is compiled as if the pass were off. To report it, run again "
    "with FUSION_PASS_DEBUG=<folder> and attach the graph_*.failed.txt written there; register(strict=True) raises the error."
)


class FusionPassWarning(UserWarning):
    """The pass failed on a graph, which is compiled without it."""


class FusionPassError(RuntimeError):
    """The pass failed, raised with ``strict=True``; its cause is the exception that stopped it.

    Attributes:
        stage: what the pass was doing: ``plan``, ``rewrite``, ``lower``, ``record``, ``show casts``, ``hide casts``,
            ``keep distances``, ``make constants``, ``cache key``, or ``run``, between these.
        site: the site or operation at which it was, as text, or None.
    """

    def __init__(self, stage: str, site: str | None, cause: BaseException) -> None:
        at = f" at {site}" if site else ""
        super().__init__(f"fusion_pass failed in stage {stage!r}{at}: {type(cause).__name__}: {cause}")
        self.stage = stage
        self.site = site


@contextlib.contextmanager
def during(stage: str, site: Any = None) -> Iterator[None]:
    """Have an exception of the block name the stage, and the site; the innermost block that knows one counts."""
    try:
        yield
    except (FusionPassError, ExpectedError):
        raise
    except Exception as error:
        raise FusionPassError(stage, None if site is None else _described(site), error) from error


class ExpectedError(RuntimeError):
    """What a user has asked to be raised: no failure of the pass."""


def _described(site: Any) -> str:
    try:
        return str(site)
    except Exception as error:
        return f"a site that cannot be printed ({type(error).__name__})"


class Undo:
    """A graph's nodes, their operations and arguments as they were, to restore them.

    Nodes that were erased come back as new nodes of the same name, operation and metadata; the others are the same nodes.
    Remembering keeps references alone, copies nothing.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.before: list[tuple[fx.Node, Any, Any, Any]] | None = None

    def remember(self) -> None:
        """The graph is about to be changed for the first time."""
        if self.before is None:
            self.before = [(node, node.target, node.args, node.kwargs) for node in self.graph.nodes]

    def restore(self) -> None:
        if self.before is None:
            return
        known = {node for node, *_ in self.before}
        for node in self.graph.nodes:
            node.args, node.kwargs = (), {}
        for node in list(self.graph.nodes):
            if node not in known:
                self.graph.erase_node(node)
        twins = {node: self._revived(node, target) if node._erased else node for node, target, *_ in self.before}
        # The last is the output, which no one erases.
        following = self.before[-1][0]
        for node, *_ in reversed(self.before[:-1]):
            following.prepend(twins[node])
            following = twins[node]
        for node, target, args, kwargs in self.before:
            twin = twins[node]
            if twin.target is not target:
                twin.target = target
            twin.args = fx.node.map_arg(args, twins.__getitem__)
            twin.kwargs = fx.node.map_arg(kwargs, twins.__getitem__)

    def _revived(self, node: fx.Node, target: Any) -> fx.Node:
        twin = self.graph.create_node(node.op, target, type_expr=node.type)
        twin.name, twin.meta = node.name, node.meta
        return twin


@contextlib.contextmanager
def contained(graph: fx.Graph, *, strict: bool, errors: list[FusionPassError] | None = None) -> Iterator[Undo]:
    """Restore the graph if the block raises; then raise with ``strict``, else warn and add the error to ``errors``."""
    undo = Undo(graph)
    try:
        yield undo
    except ExpectedError:
        raise
    except FusionPassError as error:
        undo.restore()
        if strict:
            raise
        tell(error)
        if errors is not None:
            errors.append(error)
    except BaseException:
        undo.restore()
        raise


def tell(error: FusionPassError) -> None:
    """Warn of a failure: the user, and with its traceback the log and the folder of FUSION_PASS_DEBUG."""
    from . import debug
    from .inductor import counters

    counters["fusion_pass"]["failed"] += 1
    text = "".join(traceback.format_exception(error))
    log.info("%s", text)
    # Telling must not fail either: the folder may be what cannot be written to.
    with contextlib.suppress(Exception):
        debug.record_failure(text)
    warnings.warn(f"{error}\n{_HOW_TO_REPORT}", FusionPassWarning, stacklevel=2)
