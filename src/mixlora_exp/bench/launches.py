"""Counts the operations that a computation gives to its device, on any machine.

On a GPU each of them is a kernel launch, of which a step may have too many. Views and allocations
launch nothing. An operation that is one here may be several kernels there: LLaMA's step has 2 to
10 % more in a profile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OWN = ("mixlora", "mixlora_interpreted")
"""Namespaces of this project's operators, which count as what they launch."""
NOTHING = frozenset(
    (
        *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty"),
        *("new_empty_strided", "_unsafe_view", "lift_fresh", "detach_", "set_", "resize_"),
        *("record_stream", "requires_grad_", "rename_"),
    )
)
"""Operations that launch nothing, though their schema does not say so."""

Replace = Callable[[str, dict[str, Any]], None]
"""Given a Triton kernel's name and arguments by name."""


class LaunchCounter(TorchDispatchMode):
    """Within it each launch is counted by its operation's name, of a Triton kernel `triton:NAME`:

        with LaunchCounter() as counter:
            model(**batch).loss.backward()
        counter.total, counter.launches["mm"]

    `replace`: called in place of each Triton kernel, to fill its results where no kernel can run.
    A kernel that is given fake tensors is counted and not run.
    """

    def __init__(self, replace: Replace | None = None) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self._replace, self._inside_kernel = replace, False
        self._hooks: list[ExitStack] = []

    @property
    def total(self) -> int:
        """All launches so far."""
        return self.launches.total()

    def __enter__(self) -> LaunchCounter:
        # Entered anew within an operator of this project, when the hook is there already.
        hook = ExitStack()
        if not self._hooks and find_spec("triton") is not None:
            from mixlora_exp.kernels.triton.launches import launched_by

            hook.enter_context(launched_by(self._launch))
        self._hooks.append(hook)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.pop().close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload) or self._inside_kernel:
            return func(*args, **kwargs)
        if func.namespace in OWN:
            with self:
                return _implementation(func, args, kwargs)(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if _launches(func, name):
            self.launches[name] += 1
        return func(*args, **kwargs)

    def _launch(self, name: str, arguments: dict[str, Any], run: Callable[[], Any]) -> Any:
        self.launches[f"triton:{name}"] += 1
        # Triton's interpreter computes with tensors.
        self._inside_kernel = True
        try:
            if self._replace is not None:
                return self._replace(name, arguments)
            fake = any(isinstance(value, FakeTensor) for value in tree_leaves(arguments))
            return None if fake else run()
        finally:
            self._inside_kernel = False


def _launches(func: OpOverload, name: str) -> bool:
    if name == "_local_scalar_dense":  # `.item()`: a copy to the host.
        return True
    schema = func._schema
    if name in NOTHING or func.is_view:
        return False
    return schema.is_mutable or any("Tensor" in str(one.type) for one in schema.returns)


def _implementation(func: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Callable[..., Any]:
    """Return the function registered by `torch.library` for the device of the first tensor. The
    dispatcher itself would call it where this counter sees nothing."""
    leaves = tree_leaves((args, kwargs))
    device = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
    functions = OPDEFS[func._schema.name]._backend_fns
    return functions.get(device) or functions[None]
