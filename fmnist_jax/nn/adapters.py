"""Modules of Flax NNX, Equinox and Haiku as models with `init` and `apply`.

An adapter holds the class of a module and its arguments. It hashes and compares by value, so that
equal models share one compiled program. Constructing the module again in each call costs time only
when a program is traced.
"""

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A class of modules and the arguments of its constructor, as a `Model`.

    Attributes:
      module: the class.
      options: names and values, which must be hashable.
    """

    module: Any
    options: tuple[tuple[str, Any], ...] = ()

    def init(self, key: jax.Array, images: jax.Array, /, *, train: bool) -> dict[str, Any]:
        """Returns {"params": ...}, and {"state": ...} if the module has other variables."""
        del train
        params, state = self._init(key, images)
        return {"params": params} | ({"state": state} if jax.tree.leaves(state) else {})

    def apply(
        self, variables: Any, images: jax.Array, /, *, train: bool, rngs: Any = None,
        mutable: Any = (), **options: Any,
    ) -> Any:  # fmt: skip
        """Returns the logits, and with `mutable` the new state."""
        key = rngs["dropout"] if rngs else None
        logits, state = self._apply(variables, images, train, key, options)
        return (logits, {"state": state}) if mutable else logits

    def _init(self, key: jax.Array, images: jax.Array) -> tuple[Any, Any]:
        raise NotImplementedError

    def _apply(
        self, variables: Any, images: jax.Array, train: bool, key: jax.Array | None, options: Any
    ) -> tuple[jax.Array, Any]:
        raise NotImplementedError

    def _create(self, **keys: Any) -> Any:
        return self.module(**dict(self.options), **keys)

    def _accepted(self, **arguments: Any) -> dict[str, Any]:
        """Returns those of the arguments that the module's `__call__` has."""
        names = inspect.signature(self.module.__call__).parameters
        return {name: value for name, value in arguments.items() if name in names}


class NnxModel(Adapter):
    """A Flax NNX module, whose constructor takes `rngs`.

    `train()` and `eval()` of the module switch dropout and batch statistics; its `__call__` may
    take `train` as well. Variables other than `nnx.Param` are the collection "state".
    """

    def _init(self, key: jax.Array, images: jax.Array) -> tuple[Any, Any]:
        del images
        return self._variables(self._seeded(*jax.random.split(key)))

    def _apply(
        self, variables: Any, images: jax.Array, train: bool, key: jax.Array | None, options: Any
    ) -> tuple[jax.Array, Any]:
        from flax import nnx

        unused = jax.random.key(0)
        module = self._seeded(unused, unused if key is None else key)
        for state, name in zip(self._states(module), ("params", "state"), strict=True):
            nnx.replace_by_pure_dict(state, variables.get(name, {}))
            nnx.update(module, state)
        (module.train if train else module.eval)()
        logits = module(images, **self._accepted(train=train), **options)
        return logits, self._variables(module)[1]

    def _seeded(self, params_key: jax.Array, dropout_key: jax.Array) -> Any:
        from flax import nnx

        return self._create(rngs=nnx.Rngs(params=params_key, dropout=dropout_key))

    def _states(self, module: Any) -> tuple[Any, Any]:
        from flax import nnx

        others = nnx.Not(nnx.Any(nnx.Param, nnx.RngState))
        return nnx.state(module, nnx.Param), nnx.state(module, others)

    def _variables(self, module: Any) -> tuple[Any, Any]:
        from flax import nnx

        params, state = map(nnx.to_pure_dict, self._states(module))
        return params, state


class EquinoxModel(Adapter):
    """An Equinox module, whose constructor takes `key`.

    It sees one image, float[channels, height, width], under `vmap` with the axis name "batch". Its
    `__call__` may take `key` for dropout, and `state`, which it then returns after the logits.
    """

    def _init(self, key: jax.Array, images: jax.Array) -> tuple[Any, Any]:
        del images
        params, _, state = self._split(key)
        return params, state

    def _apply(
        self, variables: Any, images: jax.Array, train: bool, key: jax.Array | None, options: Any
    ) -> tuple[jax.Array, Any]:
        import equinox as eqx

        _, static, state = self._split(jax.random.key(0))
        module = eqx.nn.inference_mode(eqx.combine(variables["params"], static), not train)
        # A copy, because Equinox invalidates a state object that it has updated.
        state = jax.tree.map(lambda leaf: leaf, variables.get("state", state))
        has_state = bool(self._accepted(state=state))

        def call(image: jax.Array, key: jax.Array | None) -> Any:
            return module(image, **self._accepted(state=state, key=key), **options)

        keys = None if key is None else jax.random.split(key, len(images))
        outputs = jax.vmap(call, axis_name="batch", out_axes=(0, None) if has_state else 0)(
            jnp.moveaxis(images, -1, 1), keys
        )
        return outputs if has_state else (outputs, state)

    def _split(self, key: jax.Array) -> tuple[Any, Any, Any]:
        import equinox as eqx

        module, state = eqx.nn.make_with_state(self._create)(key=key)
        return *eqx.partition(module, eqx.is_inexact_array), state


class HaikuModel(Adapter):
    """A Haiku module, whose `__call__` may take `train`. Its state is the collection "state"."""

    def _init(self, key: jax.Array, images: jax.Array) -> tuple[Any, Any]:
        # Batch normalization of Haiku creates its state in training only.
        return self._transformed().init(key, images, train=True)

    def _apply(
        self, variables: Any, images: jax.Array, train: bool, key: jax.Array | None, options: Any
    ) -> tuple[jax.Array, Any]:
        state = variables.get("state", {})
        return self._transformed().apply(
            variables["params"], state, key, images, train=train, **options
        )

    def _transformed(self) -> Any:
        import haiku as hk

        def forward(images: jax.Array, *, train: bool, **options: Any) -> jax.Array:
            return self._create()(images, **self._accepted(train=train), **options)

        return hk.transform_with_state(forward)


_ADAPTERS = {"flax.nnx": NnxModel, "equinox": EquinoxModel, "haiku": HaikuModel}


def find_adapter(target: Any) -> type[Adapter] | None:
    """Returns the adapter of a class of modules, or None if it needs none."""
    for name, adapter in _ADAPTERS.items():
        framework = sys.modules.get(name)  # a class of it exists only if it was imported
        if framework and isinstance(target, type) and issubclass(target, framework.Module):
            return adapter
    return None


def construct(target: Any, options: Mapping[str, Any]) -> Any:
    """Constructs a model from a class of modules of any framework, or calls a function."""
    adapter = find_adapter(target)
    return adapter(target, tuple(sorted(options.items()))) if adapter else target(**options)


def constructor_parameters(target: Any) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a class or function that a user gives, by name."""
    # A class of a framework has the signature of its metaclass.
    signature = inspect.signature(
        target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    )
    not_given = ("self", "parent", "name", "rngs", "key")  # of Linen, Haiku, NNX and Equinox
    parameters = signature.parameters.items()
    return {name: parameter for name, parameter in parameters if name not in not_given}


def init_variables(key: jax.Array, images: jax.Array, *, model: Any) -> dict[str, Any]:
    """Calls `init` of a model; a Linen module may draw from the stream "dropout" as well."""
    keys: Any = key
    if isinstance(model, nn.Module):
        keys = {"params": key, "dropout": jax.random.fold_in(key, 1)}
    return dict(model.init(keys, images, train=False))
