"""The loss, and metrics as sums, which are divided once at the end."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Norms(NamedTuple):
    """Sums over steps of Euclidean norms, each of all leaves together, float32[].

    Attributes:
      grads: of the gradient.
      params: of the parameters before the step.
      updates: of what the step added to them.
    """

    grads: jax.Array
    params: jax.Array
    updates: jax.Array


class Metrics(NamedTuple):
    """Sums over examples.

    Attributes:
      loss: float32[], sum of the losses.
      correct: int32[], examples whose largest logit is their label's.
      num_examples: int32[].
      finite_steps: int32[], batches before the first with a loss that is not finite.
      norms: sums over the batches, where `StepConfig.log_norms` is set; otherwise None.
    """

    loss: jax.Array
    correct: jax.Array
    num_examples: jax.Array
    finite_steps: jax.Array
    norms: Norms | None = None

    def means(self) -> dict[str, float]:
        """Mean loss in nats, accuracy as a fraction and mean norms, as Python floats."""
        loss, correct, num_examples, num_steps, norms = jax.device_get(self)
        means = {
            "loss": float(loss) / float(num_examples),
            "accuracy": float(correct) / float(num_examples),
        }
        if norms is not None:
            for name, total in zip(("grad_norm", "param_norm", "update_norm"), norms, strict=True):
                means[name] = float(total) / max(float(num_steps), 1.0)
        return means


def zeros(log_norms: bool = False) -> Metrics:
    """Metrics of no examples, with or without norms."""
    norms = Norms(jnp.float32(0), jnp.float32(0), jnp.float32(0)) if log_norms else None
    return Metrics(jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.int32(0), norms)


def merge(first: Metrics, then: Metrics) -> Metrics:
    """Metrics of the examples of both.

    Example:
      >>> logits, labels = jnp.float32([[1, 0]]), jnp.int32([0])
      >>> one = measure(jnp.float32([0.5]), logits, labels, jnp.array([True]))
      >>> merge(one, merge(one, zeros())).means()
      {'loss': 0.5, 'accuracy': 1.0}
    """
    return Metrics(
        first.loss + then.loss,
        first.correct + then.correct,
        first.num_examples + then.num_examples,
        first.finite_steps + jnp.where(jnp.isfinite(first.loss), then.finite_steps, 0),
        jax.tree.map(jnp.add, first.norms, then.norms),
    )


def measure(losses: jax.Array, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Metrics:
    """Metrics of one batch.

    Args:
      losses: float[batch].
      logits: float[batch, num_classes].
      labels: int[batch], values in [0, num_classes).
      mask: bool[batch], False for padding, which does not count.
    """
    loss = jnp.sum(jnp.where(mask, losses.astype(jnp.float32), 0))
    return Metrics(
        loss,
        jnp.sum(mask & (jnp.argmax(logits, axis=-1) == labels), dtype=jnp.int32),
        jnp.sum(mask, dtype=jnp.int32),
        jnp.isfinite(loss).astype(jnp.int32),
    )


def cross_entropy(
    logits: jax.Array, labels: jax.Array, label_smoothing: float | jax.Array | None = None
) -> jax.Array:
    """Softmax cross-entropy of each example in nats.

    The label's logit is picked by a comparison: the gradient of an index would be a scatter, which
    is slow on accelerators.

    Args:
      logits: float[batch, num_classes].
      labels: int[batch], values in [0, num_classes).
      label_smoothing: fraction of the target that is spread evenly over all classes (Szegedy et al.
        2016), in [0, 1), which may be traced; None is 0.

    Returns:
      float[batch]; NaN for a label outside its range.

    Example:
      >>> print(cross_entropy(jnp.zeros((1, 4)), jnp.array([2])))
      [1.3862944]
    """
    is_label = labels[:, None] == jnp.arange(logits.shape[-1])[None, :]
    picked = jnp.sum(jnp.where(is_label, logits, 0), axis=-1)
    # A label outside [0, num_classes) gives NaN, not a small loss.
    picked = jnp.where(jnp.any(is_label, axis=-1), picked, jnp.nan)
    if label_smoothing is not None:
        picked += label_smoothing * (jnp.mean(logits, axis=-1) - picked)
    return jax.nn.logsumexp(logits, axis=-1) - picked
