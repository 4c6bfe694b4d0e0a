"""Differentiable augmentation: the same random change for real and learned images."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Augmentation", "augment", "changed"]


class Augmentation(NamedTuple):
    """How far images are changed.

    `shift` in pixels, `scale` as a factor up or down, `rotate` in degrees, `brightness`
    added, `contrast` as a factor, `cutout` the share of the height and width that is
    blanked, `flip` left and right. Zero, or False, leaves a change out.

    >>> import jaxcompress as jc
    >>> jc.distill.dataset.Augmentation(flip=False).shift
    3.5
    """

    shift: float = 3.5
    scale: float = 1.2
    rotate: float = 15.0
    brightness: float = 0.5
    contrast: float = 0.5
    cutout: float = 0.5
    flip: bool = True


def augment(key: jax.Array, images: jax.Array, how: Augmentation | None = None) -> jax.Array:
    """Changes all images in one random way, which gradients pass through.

    One of colour, geometry, cutout and flip is drawn, and its amount. With the same key
    real and learned images change alike, so that what is compared stays comparable
    (siamese augmentation).

    Args:
      key: a random key.
      images: `[n, height, width, channels]`, floating.
      how: the ranges; those of the paper if None.

    Returns:
      Images of the same shape.

    Raises:
      ValueError: images that are not of four dimensions.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> images, key = jnp.arange(32.0).reshape(2, 4, 4, 1), jax.random.key(0)
    >>> still = jc.distill.dataset.Augmentation(0, 1, 0, 0, 0, 0, flip=False)
    >>> bool(jnp.allclose(jc.distill.dataset.augment(key, images, still), images, atol=1e-5))
    True

    Zhao and Bilen, 2021, Dataset Condensation with Differentiable Siamese Augmentation,
    arXiv:2102.08259.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be [n, height, width, channels]; got {images.shape}")
    how = Augmentation() if how is None else how
    which_key, first, second, third, fourth = jax.random.split(key, 5)
    uniform = lambda key: jax.random.uniform(key, (), images.dtype, -1.0, 1.0)
    a, b, c, e = (uniform(k) for k in (first, second, third, fourth))

    def colour(x: jax.Array) -> jax.Array:
        mean = jnp.mean(x, (1, 2, 3), keepdims=True)
        return (x - mean) * (1 + how.contrast * a) + mean + how.brightness * b

    def geometry(x: jax.Array) -> jax.Array:
        angle = jnp.deg2rad(how.rotate) * a
        return _moved(x, angle, how.scale**b, how.shift * c, how.shift * e)

    def cutout(x: jax.Array) -> jax.Array:
        blank = jnp.ones((), bool)
        for axis, at in ((1, a), (2, b)):
            size = x.shape[axis]
            place = jnp.arange(size).reshape([size if d == axis else 1 for d in range(4)])
            middle = (size - 1) * (1 + at) / 2
            blank = blank & (jnp.abs(place - middle) < how.cutout * size / 2)
        return jnp.where(blank, 0.0, x)

    def flip(x: jax.Array) -> jax.Array:
        return jnp.where(a > 0, x[:, :, ::-1], x) if how.flip else x

    which = jax.random.randint(which_key, (), 0, 4)
    return jax.lax.switch(which, [colour, geometry, cutout, flip], images)


def changed(key: jax.Array, images: jax.Array, how: Augmentation | None) -> jax.Array:
    """Augmented images, or the images as they are if there is no augmentation."""
    return images if how is None else augment(key, images, how)


def _moved(
    x: jax.Array, angle: jax.Array, scale: jax.Array, up: jax.Array, left: jax.Array
) -> jax.Array:
    """Rotated, scaled and shifted about the middle, bilinear, black beyond the border."""
    height, width = x.shape[1:3]
    row, column = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    y, z = row - (height - 1) / 2, column - (width - 1) / 2
    cos, sin = jnp.cos(angle) / scale, jnp.sin(angle) / scale
    at = jnp.stack(
        [cos * y - sin * z + (height - 1) / 2 + up, sin * y + cos * z + (width - 1) / 2 + left]
    )
    one = lambda image: jax.scipy.ndimage.map_coordinates(image, list(at), order=1)
    return jax.vmap(jax.vmap(one, -1, -1))(x)
