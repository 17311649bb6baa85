"""
Liveness: when the tensors of a computation come and go, and so how many bytes it holds at most.

Alive watches an eager computation. Liveness reads the graph of a compiled one.
"""

import operator
import weakref
from collections.abc import Callable, Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# parts of the names of operations that Inductor does not fuse with what is around them
KERNELS = ('mm', 'scaled_dot_product', 'attention', 'embedding_dense', 'index_put', 'scatter', 'sort', 'topk', 'cumsum')


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({s._cdata: s.nbytes() for s in [t.untyped_storage() for t in tensors]}.values())


class Alive(TorchDispatchMode):
    """
    Counts the bytes of storages that operations make in this mode and that still exist: `now`, and at most `peak`.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]):
        """tensors: those that exist already. They are named because an operation may return a view of one."""
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet(t.untyped_storage() for t in tensors)

    def forget_peak(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (storage := t.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, n):
        self.now += n
        self.peak = max(self.peak, self.now)


class Liveness:
    """When the tensors of a torch.fx graph come and go, if everything that can be fused is fused."""

    def __init__(self, graph: torch.fx.Graph):
        self.nodes, self.place = list(graph.nodes), {node: i for i, node in enumerate(graph.nodes)}
        self.storages = {node: {s._cdata: s for s in self._storages(node)} for node in self.nodes}
        self.exists, self.until = {}, {}
        for node in reversed(self.nodes):
            self.exists[node] = self._exists(node)
            # a tensor that is fused is computed where it is used, so what it is made of has to stay until then
            self.until[node] = max([self.place[node], *(
                self.until[user] if self._is_view(user, node) or not self.exists[user] else self.place[user]
                for user in node.users)])

    @staticmethod
    def _storages(node):
        return [s for t in tree_leaves(node.meta.get('val')) if isinstance(t, torch.Tensor)
                and isinstance((s := t.untyped_storage()).nbytes(), int)]  # not a random state's, of unknown length

    def _is_view(self, user, node):
        return user.target is operator.getitem or bool(self.storages[user].keys() & self.storages[node].keys())

    def _is_kernel(self, node):
        return (not isinstance(node.target, torch._ops.OpOverload)
                or any(part in node.target.overloadpacket.__name__ for part in KERNELS))

    def _exists(self, node):
        """Whether it is in memory: the result of a kernel or a reduction, or what one of these or the output reads."""
        if node.op != 'call_function' or self._is_kernel(node):
            return True
        size = sum(s.nbytes() for s in self.storages[node].values())
        if any(size < s.nbytes() for source in node.all_input_nodes for s in self.storages[source].values()):
            return True
        return any(self.exists[user] if self._is_view(user, node) else user.op == 'output' or self._is_kernel(user)
                   for user in node.users)

    def run(self, frees: Callable[[torch.fx.Node], bool] = lambda node: False) -> tuple[int, int]:
        """
        (the most bytes, the bytes at the end) of what the graph makes. frees: which inputs go after their last use.
        """
        ends, maker, until = {}, {}, {}
        for node in self.nodes:
            for key in self.storages[node]:
                maker.setdefault(key, node)
                until[key] = max(until.get(key, 0), self.until[node])
        for key, i in until.items():
            ends.setdefault(i, []).append(key)
        now = peak = 0
        for i, node in enumerate(self.nodes):
            if node.op == 'output':
                break
            if node.op != 'placeholder' and self.exists[node]:
                now += sum(s.nbytes() for key, s in self.storages[node].items() if maker[key] is node)
            peak = max(peak, now)
            for key in ends.get(i, []):
                made_by = maker[key]
                if frees(made_by) if made_by.op == 'placeholder' else self.exists[made_by]:
                    now -= self.storages[made_by][key].nbytes()
        return peak, now
